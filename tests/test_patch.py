# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Hooks and intercepted calls, on modules that are no denoisers."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from mmagic_tome.patch import (
    Context,
    Hook,
    Interceptor,
    Patch,
    find_patch,
    hooks_of,
    intercept,
    interceptors_of,
    keep_last,
    register,
    release,
    remove,
    restore,
)


class Add(Hook):
    """Add one to what goes in, or to what comes out."""

    def __call__(self, module, args, kwargs, *output):
        return output[0] + 1 if output else ((args[0] + 1, *args[1:]), kwargs)


class AddAfter(Add):
    after = True


class Double(Interceptor):
    """Compute twice what the module does, and count."""

    skips = True

    def __init__(self, patch):
        super().__init__(patch)
        self.said = []

    def call(self, module, proceed, args, kwargs):
        self.said.append("call")
        return 2 * proceed(module, *args, **kwargs)

    def end_run(self):
        self.said.append("end")

    def set_branch(self, name):
        self.said.append(name)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        nn.init.eye_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def network():
    return Network()


def value(network):
    with torch.no_grad():
        return network(torch.ones(1, 2))[0, 0].item()


# --- hooks ----------------------------------------------------------------------------------------


def test_hooks_come_and_go(network):
    patch, other = Patch(), Patch()
    register(network, Add(patch))
    register(network.inner, AddAfter(patch))
    register(network.inner, Add(other))
    assert value(network) == 4 and find_patch(network, Patch) is patch
    removed = remove(network, patch)
    assert [path for path, _ in removed] == ["", "inner"] and value(network) == 2
    assert hooks_of(network.inner, other) and not hooks_of(network.inner, patch)
    restore(network, removed)
    assert value(network) == 4
    remove(network, patch), remove(network, other)
    assert value(network) == 1 and find_patch(network, Patch) is None
    for module in network.modules():
        for table in (
            *(module._forward_hooks, module._forward_pre_hooks),
            *(module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs),
            module._forward_hooks_always_called,
        ):
            assert not table


def test_pre_hooks_run_last_and_post_hooks_first(network):
    seen = []
    network.register_forward_hook(lambda m, args, out: seen.append(out[0, 0].item()))
    patch = Patch()
    hook = Add(patch)
    register(network, hook), register(network, AddAfter(patch))
    network.register_forward_pre_hook(lambda m, args: seen.append(args[0][0, 0].item()))
    assert value(network) == 3 and seen == [2, 3]
    keep_last(network, hook)
    seen.clear()
    assert value(network) == 3 and seen == [1, 3]


def test_a_hook_that_always_runs_does_so_after_an_exception(network):
    class Note(Hook):
        after = always = True

        def __call__(self, module, args, kwargs, output):
            seen.append(output)

    seen = []
    register(network, Note(Patch()))
    broken = network.inner.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        value(network)
    broken.remove()
    value(network)
    assert seen[0] is None and seen[1] is not None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_patched_on_its_own(network, duplicate):
    patch = Patch()
    register(network, Add(patch)), register(network.inner, Add(patch))
    other = duplicate(network)
    assert value(other) == 3
    theirs = find_patch(other, Patch)
    assert theirs is not patch and hooks_of(other.inner, theirs)
    remove(other, theirs)
    assert value(other) == 1 and value(network) == 3


# --- intercepted calls ----------------------------------------------------------------------------


def test_calls_are_intercepted_and_released(network):
    patch, cls = Patch(), type(network)
    one = Double(patch)
    intercept(network, one)
    assert value(network) == 2 and one.said == ["call"]
    assert isinstance(network, cls) and type(network).__name__ == cls.__name__
    assert type(network).__qualname__ == cls.__qualname__ and find_patch(network, Patch) is patch
    intercept(network.inner, Double(patch))
    assert value(network) == 4
    removed = remove(network, patch)
    assert value(network) == 1 and type(network) is cls and type(network.inner) is nn.Linear
    restore(network, removed)
    assert value(network) == 4 and isinstance(network.inner, nn.Linear)
    release(network, one)
    assert value(network) == 2 and type(network) is cls


def test_two_interceptors_share_a_class(network):
    first, second = Interceptor(Patch()), Double(Patch())
    intercept(network, first), intercept(network, second)
    assert value(network) == 2 and interceptors_of(network) == (first, second)
    release(network, second)
    assert value(network) == 1 and type(network) is not Network
    release(network, first)
    assert type(network) is Network and not interceptors_of(network)
    release(network, first)
    assert type(network) is Network


def test_two_modules_of_a_class_share_one(network):
    other = Network()
    intercept(network, Double(Patch()))
    assert value(other) == 1
    intercept(other, Double(Patch()))
    assert type(other) is type(network)


def test_a_forward_that_is_replaced_before_or_after(network):
    plain = network.forward
    network.forward = lambda x: plain(x) + 1
    one = Double(Patch())
    intercept(network, one)
    assert value(network) == 4
    network.forward = lambda x: plain(x) + 2
    assert value(network) == 6
    release(network, one)
    assert value(network) == 3


def test_hooks_of_others_run_with_the_call_that_proceeds(network):
    network.register_forward_hook(lambda m, args, out: out + 1)
    intercept(network, Double(Patch()))
    assert value(network) == 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_intercepted_on_its_own(network, duplicate):
    intercept(network, Double(Patch()))
    other = duplicate(network)
    with torch.no_grad():
        other.inner.weight.mul_(5)
    assert value(other) == 10 and value(network) == 2
    remove(other, find_patch(other, Patch))
    assert value(other) == 5 and type(other) is Network and value(network) == 2


def test_parametrize_changes_the_class_of_an_intercepted_module(network):
    from torch.nn.utils import parametrize

    class Negative(nn.Module):
        def forward(self, x):
            return -x

    one = Double(Patch())
    intercept(network.inner, one)
    parametrize.register_parametrization(network.inner, "weight", Negative())
    assert value(network) == -2
    parametrize.remove_parametrizations(network.inner, "weight", leave_parametrized=False)
    release(network.inner, one)
    assert value(network) == 1


def test_what_a_pipeline_says(network):
    one = Double(Patch())
    intercept(network, one)
    network._reset_stateful_cache()
    assert one.said == ["end"] and not hasattr(network, "cache_context")
    release(network, one)
    assert not hasattr(network, "_reset_stateful_cache")


def test_what_a_pipeline_says_to_a_model_of_diffusers():
    from tiny_transformers import TRANSFORMERS

    model = TRANSFORMERS["Flux.1"].build()
    one = Double(Patch())
    intercept(model, one)
    with model.cache_context("cond"):
        assert one.said == ["cond"]
    assert one.said == ["cond", None]
    with pytest.raises(KeyError), model.cache_context("uncond"):
        raise KeyError
    assert one.said[2:] == ["uncond", None]


@pytest.mark.parametrize("when", ["compiled before", "compiled after"])
@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_a_compiled_module_is_intercepted_once(network, when, how):
    def compiled():
        if how == "in place":
            network.compile(backend="eager")
            return network
        return torch.compile(network, backend="eager")

    torch._dynamo.reset()
    patch = Patch()
    if when == "compiled before":
        model = compiled()
        assert value(model) == 1
    intercept(network, Double(patch))
    intercept(network.inner, Double(patch))
    if when == "compiled after":
        model = compiled()
    assert value(model) == value(network) == 4
    remove(network, patch)
    assert value(model) == 1
    torch._dynamo.reset()


# --- contexts -------------------------------------------------------------------------------------


class Counting(Context):
    forgotten = 0

    def forget_run(self):
        self.forgotten += 1


class CountingPatch(Patch):
    context_type = Counting


def test_each_thread_has_its_context():
    patch = CountingPatch()
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(lambda: patch.context).result()
        assert patch.context is patch.context is not other
        patch.forget_run()
        assert other.forgotten == patch.context.forgotten == 1
        with patch.disabled():
            assert patch.context.disabled == 1 and not other.disabled
        assert not patch.context.disabled


def test_a_thread_in_the_middle_of_a_call_forgets_at_its_next_one():
    patch = CountingPatch()
    context = patch.context
    context.start()
    patch.forget_run()
    assert context.forgotten == 0
    context.stop()
    context.start()
    assert context.forgotten == 1 and context.running
    context.stop()
    context.start()
    assert context.forgotten == 1


def test_contexts_do_not_travel():
    patch = CountingPatch()
    patch.context.start()
    for other in (copy.deepcopy(patch), pickle.loads(pickle.dumps(patch))):
        assert other.context is not patch.context and not other.context.running


def test_warnings_come_once():
    patch = Patch()
    with pytest.warns(UserWarning, match="first") as caught:
        patch.warn_once("topic", "first")
        patch.warn_once("topic", "again")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="other"):
        patch.warn_once("other", "other")
