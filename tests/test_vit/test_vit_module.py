# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A merged vision transformer is an ordinary module: freed, hooked by others, checkpointed."""

import gc
import weakref

import pytest
import torch
from torch import nn
from vits import NAMES, build, inputs, result

from mmagic_tome import ToMeError
from mmagic_tome.vit import apply_tome_vit, find_vit


@pytest.fixture
def _no_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_gc")
@pytest.mark.parametrize("name", NAMES)
def test_freed_with_the_last_reference(name):
    build(name)  # a library's first model may stay alive in frames of its imports
    gc.freeze()  # a collection takes a second of all that was imported
    model, arguments = build(name), inputs(name)
    handle = apply_tome_vit(model, r=4, trace_source=True)
    result(model, arguments)
    with apply_tome_vit(model, r=2), handle.disabled():
        result(model, arguments)
    freed = [weakref.ref(model)]
    cyclic = name.startswith("mmpretrain")  # its transformers are, without merging, too
    if not cyclic:
        freed.append(weakref.ref(find_vit(model).blocks[0].attention))
    del model  # the handle does not keep it alive
    assert all(ref() is None for ref in freed)
    if cyclic:
        gc.collect()
    assert handle.network is None and not handle.active
    handle.remove()
    assert "removed" in handle.summary() and "gone" in repr(handle)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_others_see_the_same_whoever_came_first(name):
    """Also in the first forward."""
    arguments, seen = inputs(name), []

    def shapes(value):
        if torch.is_tensor(value):
            return tuple(value.shape)
        return [shapes(item) for item in value] if isinstance(value, (tuple, list)) else None

    def watch(model, notes):
        for block in find_vit(model).blocks:
            for part in ("module", "first", "attention", "output", "norm", "last"):
                module = getattr(block, part)
                module.register_forward_pre_hook(
                    lambda m, args, part=part: notes.append((part, shapes(args)))
                )
                module.register_forward_hook(
                    lambda m, args, output, part=part: notes.append((part, shapes(output)))
                )

    for first in (True, False):
        model, notes = build(name), []
        if first:
            watch(model, notes)
        apply_tome_vit(model, r=5)
        if not first:
            watch(model, notes)
        result(model, arguments)
        seen.append(notes)
    assert seen[0] == seen[1] and len({str(note) for note in seen[0] if note[0] == "module"}) > 4


def test_tensors_are_released_after_a_forward_that_failed():
    model, arguments = build("vit"), inputs("vit")
    handle = apply_tome_vit(model, r=4)
    weight = model.vit.layers[2].mlp.fc2.weight
    model.vit.layers[2].mlp.fc2.weight = nn.Parameter(torch.zeros(32, 47))
    with pytest.raises(RuntimeError):
        result(model, arguments)
    context = handle._patch.context
    assert not context.running and context.size is context.plan is context.metric is None
    model.vit.layers[2].mlp.fc2.weight = weight
    result(model, arguments)
    assert handle.tokens[-1][1] == 37 - 16


def test_checkpointing_across_disabled_and_with_reentrant():
    model, arguments = build("vit").train(), inputs("vit")
    handle = apply_tome_vit(model, r=6)
    with torch.enable_grad():
        gradients = []
        for checkpoints in (False, True):
            if checkpoints:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            with handle.disabled():
                loss = result(model, arguments).square().sum()
            # Blocks run again outside of disabled(), as what they were.
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        loss = result(model, {"pixel_values": arguments["pixel_values"].requires_grad_()})
        with pytest.raises(ToMeError, match="use_reentrant=False"):
            loss.sum().backward()
