# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Gradients of a merged network, also where its blocks run again for them."""

from functools import partial

import pytest
import torch
from tiny import run, tiny_inputs, tiny_unet

from mmagic_tome import ToMeError, apply_tome, get_handle
from mmagic_tome.patch import find_patch
from mmagic_tome.tome.state import TomePatch

EVERYTHING = dict(ratio=0.5, max_downsample=8, targets=["attn", "crossattn", "mlp"])


@pytest.fixture
def unet():
    return tiny_unet(levels=1)


@pytest.fixture
def deep():
    return tiny_unet(levels=3).train()


def double(inputs):
    """Inputs in float64."""
    floating = {k for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return {k: v.double() if k in floating else v for k, v in inputs.items()}


@pytest.mark.parametrize("targets", [["attn", "crossattn", "mlp"], "block", "stack"], ids=str)
def test_gradcheck_of_the_whole_unet_in_float64(unet, targets):
    """Numeric gradients along random directions, of the sample and of a weight in a block."""
    apply_tome(unet.double(), ratio=0.5, targets=targets)
    inputs = double(tiny_inputs(size=4))
    sample = inputs.pop("sample")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    weight = unet.get_parameter(name).detach().clone()

    def forward(sample, weight):
        return torch.func.functional_call(unet, {name: weight}, (sample,), inputs).sample

    arguments = (sample.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(forward, arguments, fast_mode=True)
    assert {row["kept"] for row in get_handle(unet).stats()} == {8}


def test_gradient_checkpointing_gives_the_same_gradients_to_every_parameter(deep):
    """Also where the network has gone on to another step and size when its blocks run again."""
    apply_tome(deep, **EVERYTHING)
    calls = [
        dict(timestep=torch.tensor(900)),
        dict(timestep=torch.tensor(100)),
        tiny_inputs(size=8),
    ]

    def gradients(calls):
        deep.zero_grad()
        losses = [deep(**{**tiny_inputs(), **call}).sample.square().mean() for call in calls]
        run(deep)  # a validation in between
        sum(losses).backward()
        return [p.grad.clone() for p in deep.parameters()]

    expected = [gradients(calls[:1]), gradients(calls)]
    assert all(gradient.any() for gradient in expected[0])
    deep.enable_gradient_checkpointing()
    torch.testing.assert_close([gradients(calls[:1]), gradients(calls)], expected)
    # The other kind of checkpointing is refused.
    for module in deep.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
            module._gradient_checkpointing_func = func
    with pytest.raises(ToMeError, match="use_reentrant=False"):
        gradients(calls[:1])


def test_saved_plans_live_as_long_as_the_graph(deep):
    apply_tome(deep, ratio=0.5)
    blocks = find_patch(deep, TomePatch).blocks
    run(deep)
    assert not any(len(block.saved) for block in blocks)
    out = deep(**tiny_inputs()).sample
    assert all(len(block.saved) == 1 for block in blocks)
    del out
    assert not any(len(block.saved) for block in blocks)
