# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Run something around the first import of a module, and not before.

``import mmagic_tome`` must not cost a diffusers user the import of MMagic, and a patch that is in
place only while one module is imported cannot disturb any other. The hook leaves ``sys.meta_path``
when nothing is left to wait for.
"""

import contextlib
import importlib.abc
import sys


def around_import(name, callback):
    """Enter the context manager that ``callback()`` returns around the code of a module that is not
    imported yet. After an exception it is called again at the next attempt."""
    _IMPORT_HOOK.waiting.setdefault(name, []).append(callback)
    if _IMPORT_HOOK not in sys.meta_path:
        sys.meta_path.insert(0, _IMPORT_HOOK)


def when_imported(name, action):
    """Call ``action()`` once, right after the next import of a module that succeeds; now if it
    has."""
    if name in sys.modules:
        action()
        return

    @contextlib.contextmanager
    def after():
        yield
        action()

    around_import(name, after)


class _ImportHook(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, with a loader that calls back."""

    def __init__(self):
        self.waiting = {}

    def find_spec(self, name, path=None, target=None):
        # Nothing is called or forgotten here: ``importlib.util.find_spec`` imports nothing.
        others = sys.meta_path if name in self.waiting else ()
        for finder in others:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None

    def pop(self, name):
        callbacks = self.waiting.pop(name, [])
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        return callbacks


class _Loader(importlib.abc.Loader):
    """The real loader, with the callbacks around ``exec_module``."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):  # get_source, is_package, get_resource_reader, ...
        if name == "real":
            raise AttributeError(name)
        return getattr(self.real, name)

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        # From here on the module is an ordinary one: inspect, pickle, reload and
        # resource readers meet the loader they would have met without us.
        module.__spec__.loader = module.__loader__ = self.real
        name = module.__name__
        callbacks = _IMPORT_HOOK.pop(name)
        try:
            with contextlib.ExitStack() as stack:
                for callback in callbacks:
                    stack.enter_context(callback())
                self.real.exec_module(module)
        except BaseException:
            # The user may install what was missing and import again in this process.
            for callback in callbacks:
                around_import(name, callback)
            raise


_IMPORT_HOOK = _ImportHook()
