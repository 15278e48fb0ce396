# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Hooks and intercepted calls, on modules that are no denoisers."""

import copy
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_transformers import TRANSFORMERS
from torch import nn
from torch.nn.utils import parametrize

from mmagic_tome.patch import (
    Context,
    Hook,
    Interceptor,
    Patch,
    find_patch,
    hooks_of,
    intercept,
    interceptors_of,
    register,
    release,
    remove,
)


class Add(Hook):
    """Add one to what goes in."""

    def __call__(self, module, args, kwargs):
        return (args[0] + 1, *args[1:]), kwargs


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


def new_network():
    """The identity, in a network with one module inside."""
    network = nn.Sequential(OrderedDict(inner=nn.Linear(2, 2)))
    nn.init.eye_(network.inner.weight)
    nn.init.zeros_(network.inner.bias)
    return network


@pytest.fixture
def network():
    return new_network()


def value(network):
    with torch.no_grad():
        return network(torch.ones(1, 2))[0, 0].item()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_patched_on_its_own(network, duplicate):
    patch = Patch()
    register(network.inner, Add(patch)), intercept(network, Double(patch))
    other = duplicate(network)
    assert value(other) == 4
    theirs = find_patch(other, Patch)
    assert theirs is not patch and hooks_of(other.inner, theirs)
    other.inner.weight.data.mul_(5)
    assert value(other) == 20 and value(network) == 4
    # In another process torch must not give out the hook's key again.
    later = other.inner.register_forward_pre_hook(lambda m, args: None)
    assert later.id > hooks_of(other.inner, theirs)[0].id
    remove(other, theirs)
    assert value(other) == 5 and type(other) is nn.Sequential and value(network) == 4


# --- intercepted calls ----------------------------------------------------------------------------


def test_calls_are_intercepted_and_released(network):
    patch, cls, other = Patch(), type(network), new_network()
    network.register_forward_hook(lambda m, args, out: out + 1)  # runs with what proceeds
    one = Double(patch)
    intercept(network, one)
    assert value(network) == 4 and one.said == ["call"] and value(other) == 1
    assert isinstance(network, cls) and type(network) is not cls
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(network), name) == getattr(cls, name)
    intercept(network.inner, Double(patch))
    assert value(network) == 6
    remove(network, patch)
    assert value(network) == 2 and type(network) is cls and type(network.inner) is nn.Linear
    intercept(network, one), intercept(other, one)
    assert type(other) is type(network)  # modules of a class share one


def test_several_interceptors_of_a_module(network):
    first, second = Interceptor(Patch()), Double(Patch())
    intercept(network, first), intercept(network, second)
    assert value(network) == 2 and interceptors_of(network) == (first, second)
    intercept(network, third := Double(Patch()), first=True)
    assert value(network) == 2 and third.said and len(second.said) == 1
    for one in (third, second):
        release(network, one)
    assert value(network) == 1 and type(network) is not nn.Sequential
    for _ in range(2):
        release(network, first)
        assert type(network) is nn.Sequential and not interceptors_of(network)


def test_classes_that_are_derived_from_an_intercepted_one(network):
    """As ``parametrize`` and ``fully_shard`` do."""

    class Negative(nn.Module):
        def forward(self, x):
            return -x

    one = Double(Patch())
    intercept(network.inner, one)
    parametrize.register_parametrization(network.inner, "weight", Negative())
    assert value(network) == -2
    parametrize.remove_parametrizations(network.inner, "weight", leave_parametrized=False)
    network.inner.__class__ = type("Sharded", (type(network.inner),), {})
    release(network.inner, one)
    assert value(network) == 1 and type(network.inner).__name__ == "Sharded"
    intercept(network.inner, one)
    assert value(network) == 2


def test_what_a_pipeline_says(network):
    one = Double(Patch())
    intercept(network, one)
    assert not hasattr(network, "cache_context")
    release(network, one)
    assert not hasattr(network, "_reset_stateful_cache")

    model = TRANSFORMERS["Flux.1"].build()
    intercept(model, two := Double(Patch()))
    with model.cache_context("cond"):
        assert two.said == ["cond"]
    with pytest.raises(KeyError), model.cache_context("uncond"):
        raise KeyError
    model._reset_stateful_cache()
    assert two.said == ["cond", None, "uncond", None, "end"]


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


class CountingPatch(Patch):
    class context_type(Context):
        forgotten = 0

        def forget_run(self):
            self.forgotten += 1


def test_compiled_code_leaves_the_context_of_another_thread_as_it_is():
    patch = CountingPatch()
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(lambda: patch.context).result()
        assert patch.context is patch.context is not other
        thread.submit(patch.lead_compiled).result()
        with patch.disabled():
            assert patch.context.disabled and not other.disabled


def test_a_thread_in_the_middle_of_a_call_forgets_at_its_next_one():
    patch = CountingPatch()
    context = patch.context
    context.start()
    patch.forget_run()
    assert context.forgotten == 0
    for other in (copy.deepcopy(patch), pickle.loads(pickle.dumps(patch))):
        assert other.context is not patch.context and not other.context.running
    for _ in range(2):
        context.stop()
        context.start()
        assert context.forgotten == 1 and context.running
