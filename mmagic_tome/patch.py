# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What every technique needs to change a model and back: patches, hooks, interception.

Hooks hold their :class:`Patch`; a patch holds no module, and finds its hooks by looking through the
network. So a network is freed as soon as nobody uses it, one of its blocks can be copied or pickled
alone, and a copy of the network is patched independently.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .graphs import prepare_compiler

# Instance attribute of an intercepted module: its interceptors.
_INTERCEPTORS = "_mmagic_tome_interceptors"
# Where torch keeps the hooks of a module.
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class Context:
    """What belongs to the call of a network that is under way in one thread."""

    def __init__(self) -> None:
        self.running = False  # whether the network's own call is under way
        self.disabled = 0  # how many handle.disabled() this thread is in
        self.stale = False  # state kept between steps must be dropped before the next call

    def forget_run(self) -> None:
        """Drop what is kept between steps."""

    def start(self) -> None:
        """Begin a call of the network."""
        if self.stale:
            self.stale = False
            self.forget_run()
        self.running = True

    def stop(self) -> None:
        """End a call of the network, also after an exception."""
        self.running = False


class Patch:
    """What one technique has placed on one network: subclasses keep options and statistics.

    Nothing here refers to a module, or is kept when a model is copied or pickled in the middle of a
    run.
    """

    context_type: type[Context] = Context
    # On a ControlNet: whether it was applied together with the denoiser of its model, and is
    # replaced and removed together with that.
    with_denoiser = False

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._fresh()

    def _fresh(self) -> None:
        self._threads = threading.local()
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._compiled = self.context_type()

    @property
    def context(self) -> Any:
        """The :class:`Context` of this thread.

        Compiled code knows no threads: all of it shares one, so a network with compiled parts must
        not run in two threads at once.
        """
        if torch.compiler.is_compiling():
            return self._compiled
        context = getattr(self._threads, "context", None)
        if context is None:
            context = self._threads.context = self.context_type()
            self._contexts.add(context)
        return context

    def contexts(self, shared: bool) -> tuple[Any, ...]:
        """This thread's context, and that of modules that are compiled on their own unless
        ``shared``, see :meth:`lead_compiled`."""
        if torch.compiler.is_compiling():
            return (self._compiled,)
        return (self.context,) if shared else (self.context, self._compiled)

    def lead_compiled(self) -> None:
        """Let modules that are compiled on their own use this thread's context: what depends on the
        step is decided here, outside of graphs."""
        if not torch.compiler.is_compiling():
            self._compiled = self.context

    def forget_run(self) -> None:
        """Drop what is kept between steps in every thread; a thread that is in the middle of a call
        drops it at its next one."""
        for context in [*self._contexts, self._compiled]:
            if context.running:
                context.stale = True
            else:
                context.forget_run()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Nothing is done in this thread's calls while entered."""
        # What compiled code uses may be a thread's, see lead_compiled.
        contexts = [self.context, *({self._compiled} - set(self._contexts))]
        for context in contexts:
            context.disabled += 1
            context.forget_run()
        try:
            yield
        finally:
            for context in contexts:
                context.disabled -= 1
                context.forget_run()

    def warn_once(self, topic: str, message: str) -> None:
        """Warn if this patch has not yet warned of ``topic``."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        local = ("_threads", "_contexts", "_compiled")
        return {name: value for name, value in vars(self).items() if name not in local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()
        prepare_compiler()


class Hook:
    """A hook that belongs to a patch, which all hooks of a network share."""

    after = False  # runs after the module
    always = False  # also when that raised

    def __init__(self, patch: Any) -> None:
        self.patch = patch
        self.id = 0  # torch's key, unique among all hooks of a process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Else torch would give out the key again in a new process and replace this hook.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.id + 1)


def register(module: nn.Module, hook: Hook) -> None:
    """Register a hook next to the module's own forward, so that hooks of others see what they would
    see without it."""
    if hook.after:
        # In front of all others: they see the output that leaves the module.
        options = {"prepend": True, "with_kwargs": True, "always_call": hook.always}
        hook.id = module.register_forward_hook(hook, **options).id
    else:
        hook.id = module.register_forward_pre_hook(hook, with_kwargs=True).id


def keep_last(module: nn.Module, hook: Hook) -> None:
    """Let a pre-hook run after those that were registered later, see :func:`register`."""
    if hook.id in module._forward_pre_hooks:
        module._forward_pre_hooks.move_to_end(hook.id)


def hooks_of(module: nn.Module, patch: Patch) -> list[Hook]:
    """The hooks of a patch on one module."""
    every = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in every if getattr(hook, "patch", None) is patch]


def unregister(module: nn.Module, patch: Patch) -> list[Hook]:
    """Take the hooks of a patch off one module; return them."""
    removed = hooks_of(module, patch)
    for hook in removed:
        for table in _HOOK_TABLES:
            getattr(module, table).pop(hook.id, None)
    return removed


def remove(network: nn.Module, patch: Patch) -> list[tuple[str, Any]]:
    """Take everything of a patch out of a network, exactly; (dotted path, hook or interceptor) of
    all of it, for :func:`restore`."""
    removed = []
    for path, module in network.named_modules():
        removed += [(path, hook) for hook in unregister(module, patch)]
        for interceptor in interceptors_of(module):
            if interceptor.patch is patch:
                release(module, interceptor)
                removed.append((path, interceptor))
    patch.forget_run()
    return removed


def restore(network: nn.Module, removed: list[tuple[str, Any]]) -> None:
    """Register again what :func:`remove` returned."""
    for path, item in removed:
        module = network.get_submodule(path)
        if isinstance(item, Hook):
            register(module, item)
        else:
            intercept(module, item)


def find_patch(network: nn.Module, kind: type[Patch]) -> Any:
    """The patch of a kind that a network carries; None if it carries none."""
    holders = (*network._forward_pre_hooks.values(), *interceptors_of(network))
    patches = (getattr(one, "patch", None) for one in holders)
    return next((patch for patch in patches if isinstance(patch, kind)), None)


class Interceptor:
    """Code of a patch that runs in place of a module's call, or learns what a pipeline says."""

    skips = False  # whether call() is to be used: that of a module's first such one

    def __init__(self, patch: Any) -> None:
        self.patch = patch

    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        """Run in place of ``module(*args, **kwargs)``: ``proceed(module, *args, **kwargs)``."""
        raise NotImplementedError

    def end_run(self) -> None:
        """The pipeline says that its denoising run is over."""

    def set_branch(self, name: str | None) -> None:
        """The pipeline names the guidance branch of the calls to come, such as 'cond'."""


class RunSignals(Interceptor):
    """Passes on to a tracker of runs what a pipeline says of them."""

    def end_run(self) -> None:
        self.patch.context.forget_run()

    def set_branch(self, name: str | None) -> None:
        self.patch.context.tracker.branch_name = name


def intercept(module: nn.Module, interceptor: Interceptor, first: bool = False) -> None:
    """Let an interceptor run in place of a module's call; ``first``: in place of others there.

    The module's class becomes a subclass of itself with the same name, as with ``fully_shard`` and
    ``parametrize`` of torch. Unlike a ``forward`` that is replaced on the instance this goes along
    with whatever else replaces ``forward`` (offloading, adapters), in any order; copies and
    ``DataParallel`` replicas run their own weights.
    """
    cls = type(module)
    others = interceptors_of(module)
    module.__dict__[_INTERCEPTORS] = (interceptor, *others) if first else (*others, interceptor)
    if not hasattr(cls, "_intercepted_class"):
        module.__class__ = _intercepting(cls)


def release(module: nn.Module, interceptor: Interceptor) -> None:
    """Undo :func:`intercept`."""
    rest = tuple(one for one in interceptors_of(module) if one is not interceptor)
    if rest:
        module.__dict__[_INTERCEPTORS] = rest
        return
    module.__dict__.pop(_INTERCEPTORS, None)
    # A class that was derived since (fully_shard, parametrize) stays: without interceptors its
    # calls are the module's own.
    module.__class__ = vars(type(module)).get("_intercepted_class", type(module))


def interceptors_of(module: nn.Module) -> tuple[Any, ...]:
    """The interceptors on a module."""
    return module.__dict__.get(_INTERCEPTORS, ())


_classes: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def _intercepting(base: type) -> type:
    """The subclass of a module's class whose calls are intercepted."""
    cls = _classes.get(base)
    if cls is not None:
        return cls
    plain_call, plain_impl = base.__call__, base._call_impl

    def intercepted(self, proceed, args, kwargs):
        for interceptor in self.__dict__.get(_INTERCEPTORS, ()):
            if interceptor.skips:
                return interceptor.call(self, proceed, args, kwargs)
        return proceed(self, *args, **kwargs)

    class Intercepted(base):
        __module__, __qualname__, __doc__ = base.__module__, base.__qualname__, base.__doc__
        _intercepted_class = base

        # A call is intercepted once. torch.compile(module) holds the __call__ of the class of then,
        # which goes on to _call_impl; module.compile() replaces _call_impl.
        def __call__(self, *args, **kwargs):
            if self._compiled_call_impl is None:
                return plain_call(self, *args, **kwargs)
            return intercepted(self, plain_call, args, kwargs)

        def _call_impl(self, *args, **kwargs):
            if self._compiled_call_impl is None:
                return intercepted(self, plain_impl, args, kwargs)
            return plain_impl(self, *args, **kwargs)

        # What diffusers' pipelines call on every component when they are done.
        def _reset_stateful_cache(self, *args, **kwargs):
            for interceptor in interceptors_of(self):
                interceptor.end_run()
            own = getattr(super(), "_reset_stateful_cache", None)
            return None if own is None else own(*args, **kwargs)

        if hasattr(base, "cache_context"):
            # With which diffusers' pipelines name the guidance branch of a call.
            @contextlib.contextmanager
            def cache_context(self, name, *args, **kwargs):
                for interceptor in interceptors_of(self):
                    interceptor.set_branch(name)
                try:
                    with super().cache_context(name, *args, **kwargs):
                        yield
                finally:
                    for interceptor in interceptors_of(self):
                        interceptor.set_branch(None)

        # By its own class: the subclass has no name to be found under.
        def __reduce_ex__(self, protocol):
            return _rebuild, (base,), self.__dict__

    Intercepted.__name__ = base.__name__
    _classes[base] = Intercepted
    return Intercepted


def _rebuild(base: type) -> nn.Module:
    """An empty module of the subclass of ``base``, for copying and unpickling."""
    cls = _intercepting(base)
    return cls.__new__(cls)
