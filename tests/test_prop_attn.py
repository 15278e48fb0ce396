# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Proportional attention: keys weigh as much as the tokens that they represent."""

import pytest
import torch
from tiny import error, run, tiny_inputs, tiny_unet
from tiny_transformers import TRANSFORMERS

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.methods import METHODS
from mmagic_tome.patch import find_patch
from mmagic_tome.tome.state import TomePatch

TARGETS = pytest.mark.parametrize("target", ["attn", "attn_kv"])


@pytest.fixture
def unet():
    return tiny_unet(levels=2)


@TARGETS
def test_by_hand(unet, target):
    """softmax(Q K^T / sqrt(d) + log s) V, entry by entry and head by head."""
    apply_tome(unet, prop_attn=True, targets=[target])
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    context, seen = find_patch(unet, TomePatch).context, []
    plain = attn.forward

    def forward(hidden_states, **kwargs):
        out = plain(hidden_states, **kwargs)
        seen.append((hidden_states, kwargs, list(context.plans.values()), out))
        return out

    attn.forward = forward
    run(unet)
    ((x, kwargs, (plan,), out),) = seen
    assert plan.size.max() > plan.size.min()
    keys = x if target == "attn" else kwargs["encoder_hidden_states"]
    assert keys.shape[1] == plan.num_slots < 256
    q, k, v = (
        linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for linear, x in ((attn.to_q, x), (attn.to_k, keys), (attn.to_v, keys))
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + plan.size.log()[:, None, None]
    by_hand = attn.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.filterwarnings("ignore:method=")
def test_with_every_method(unet, method):
    if method == "threshold":  # random tokens are not alike
        method = dict(type="threshold", threshold=-1)
    outputs = {}
    for prop_attn in (False, True):
        with apply_tome(unet, method=method, prop_attn=prop_attn) as handle:
            outputs[prop_attn] = run(unet)
            assert {row["kept"] < row["tokens"] for row in handle.stats()} == {True}
    assert outputs[True].isfinite().all()
    even = method in ("downsample", "todo")  # every token represents as many
    assert (error(outputs[True], outputs[False]) < 1e-5) == even


@TARGETS
def test_with_a_residual(unet, target):
    """What the residual restores is what merging loses with these weights: at one input all."""
    embedding = unet.time_embedding.register_forward_hook(lambda m, a, out: torch.ones_like(out))
    same = dict(sample=1 + tiny_inputs(seed=1)["sample"])
    baseline = run(unet, **same)
    options = dict(prop_attn=True, use_rand=False, plan_interval=2, residual=True)
    with apply_tome(unet, targets=[target], **options) as handle:
        for t in (900, 800):
            out = run(unet, **same, timestep=torch.tensor(t))
        assert {row["kept"] for row in handle.stats()} == {128}
    embedding.remove()
    torch.testing.assert_close(out, baseline, rtol=1e-4, atol=1e-5)


def test_gradients_and_precision(unet):
    handle = apply_tome(unet, prop_attn=True)
    unet(**tiny_inputs()).sample.square().sum().backward()
    to_k = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    assert to_k.weight.grad.isfinite().all() and to_k.weight.grad.abs().sum() > 0
    handle.remove()
    for dtype in (torch.bfloat16, torch.float16):
        unet.to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_inputs().items()}
        with apply_tome(unet, prop_attn=True):
            out = run(unet, **inputs)
        assert out.dtype == dtype and out.isfinite().all()


@torch.no_grad()
@TARGETS
@pytest.mark.parametrize(
    "family", ["PixArt-alpha, PixArt-sigma", "PixArt, older checkpoints", "DiT"]
)
def test_transformers_of_one_stream(family, target):
    family = TRANSFORMERS[family]
    network, inputs = family.build(), family.inputs()
    outputs = []
    for options in (dict(ratio=0), dict(ratio=0.5), dict(ratio=0.5, prop_attn=True)):
        with apply_tome(network, targets=[target], **options):
            outputs.append(network(**inputs, return_dict=False)[0])
    assert error(outputs[2], outputs[1]) > 1e-4
    assert error(outputs[2], outputs[0]) < 1


def test_networks_whose_attention_takes_no_mask():
    networks = [TRANSFORMERS[name].build() for name in ("Flux.1", "Wan 2.1, 2.2 (video)")]
    for network in networks:
        with pytest.raises(ToMeError, match="no mask to weigh keys by; write prop_attn=False"):
            apply_tome(network, prop_attn=True)
