# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Proportional attention: keys weigh as much as the tokens that they represent."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_inputs, tiny_unet
from tiny_transformers import TRANSFORMERS

from mmagic_tome import ToMeConfig, ToMeError, apply_tome
from mmagic_tome.methods import METHODS
from mmagic_tome.patch import find_patch
from mmagic_tome.tome.state import TomePatch


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=2)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


@torch.no_grad()
def run(unet, steps=(900,), **changes):
    inputs = {**tiny_inputs(), **changes}
    outputs = []
    for i, t in enumerate(steps):
        sample = inputs["sample"] * (1 - 0.02 * i)
        outputs.append(unet(**{**inputs, "sample": sample, "timestep": torch.tensor(t)}).sample)
    return torch.stack(outputs)


def error(a, b):
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


class Seen:
    """Input, output and merge plan of the first block's self-attention."""

    def __init__(self, unet):
        block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
        self.attn, patch = block.attn1, find_patch(unet, TomePatch)
        plain = block.attn1.forward

        def forward(hidden_states, **kwargs):
            self.x, self.kwargs, self.plan = hidden_states, kwargs, patch.context.plans
            self.out = plain(hidden_states, **kwargs)
            return self.out

        block.attn1.forward = forward


@pytest.mark.parametrize("target", ["attn", "attn_kv"])
def test_by_hand(unet, target):
    """softmax(Q K^T / sqrt(d) + log s) V, entry by entry and head by head."""
    apply_tome(unet, prop_attn=True, targets=[target])
    seen = Seen(unet)
    run(unet)
    (plan,) = seen.plan.values()
    assert plan.size.max() > plan.size.min()
    attn, heads = seen.attn, seen.attn.heads
    keys = seen.x if target == "attn" else seen.kwargs["encoder_hidden_states"]
    assert keys.shape[1] == plan.num_slots < 256
    q, k, v = (
        linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for linear, x in ((attn.to_q, seen.x), (attn.to_k, keys), (attn.to_v, keys))
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + plan.size.log()[:, None, None]
    by_hand = attn.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen.out, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["attn", "attn_kv"])
def test_merging_copies_loses_nothing(unet, target):
    """Where only copies merge, proportional attention is the baseline; plain attention is not."""
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    # In every other one of the 8 x 8 cells the four tokens are the same.
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 16, 8, 8, generator=generator)
    apart = torch.randn(2, 16, 16, 16, generator=generator)
    loose = (torch.arange(64.0) % 2).view(1, 1, 8, 8)
    tokens = F.interpolate(cells, scale_factor=2) + F.interpolate(loose, scale_factor=2) * apart
    tokens = tokens.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def output(**options):
        with apply_tome(unet, targets=[target], exact_matching=True, **options) as handle:
            context = find_patch(unet, TomePatch).context
            context.start()
            context.config, context.grid = handle.config, (16, 16)
            out = block(tokens, encoder_hidden_states=torch.ones(2, 7, 16))
            context.stop()
            context.clear()
        return out

    baseline = output(ratio=0)
    # 3 of 4 tokens of half of the cells.
    assert error(output(ratio=0.375, prop_attn=True), baseline) < 1e-5
    assert error(output(ratio=0.375), baseline) > 1e-3


@pytest.mark.parametrize("method", sorted(METHODS))
def test_with_every_method(unet, method):
    if method == "threshold":  # random tokens are not alike
        method = dict(type="threshold", threshold=-1)
    steps = (900, 600)
    outputs = {}
    for prop_attn in (False, True):
        with apply_tome(unet, method=method, prop_attn=prop_attn) as handle:
            outputs[prop_attn] = run(unet, steps)
            assert {row["kept"] < row["tokens"] for row in handle.stats()} == {True}
            assert ("proportional attention" in handle.summary()) == prop_attn
    assert outputs[True].isfinite().all()
    even = method in ("downsample", "todo")  # every token stands for as many
    assert (error(outputs[True], outputs[False]) < 1e-5) == even


@pytest.mark.parametrize("target", ["attn", "attn_kv"])
def test_with_a_residual(unet, target):
    """What the residual restores is what merging loses with these weights: at one input all."""
    embedding = unet.time_embedding.register_forward_hook(lambda m, a, out: torch.ones_like(out))
    same = dict(sample=1 + tiny_inputs(seed=1)["sample"])
    baseline = run(unet, (900,), **same)[0]
    options = dict(prop_attn=True, use_rand=False, plan_interval=2, residual=True)
    with apply_tome(unet, targets=[target], **options) as handle, torch.no_grad():
        for t in (900, 800):
            out = unet(**{**tiny_inputs(), **same, "timestep": torch.tensor(t)}).sample
        assert {row["kept"] for row in handle.stats()} == {128}
    embedding.remove()
    torch.testing.assert_close(out, baseline, rtol=1e-4, atol=1e-5)


def test_disabling_and_removal_to_the_bit(unet):
    baseline = run(unet)
    handle = apply_tome(unet, prop_attn=True)
    assert not torch.equal(run(unet), baseline)
    with handle.disabled():
        assert torch.equal(run(unet), baseline)
    handle.ratio = 0
    assert torch.equal(run(unet), baseline)
    handle.remove()
    assert torch.equal(run(unet), baseline)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(unet, dtype):
    unet.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_inputs().items()}
    with apply_tome(unet, prop_attn=True), torch.no_grad():
        out = unet(**inputs).sample
    assert out.dtype == dtype and out.isfinite().all()


def test_gradients_flow(unet):
    apply_tome(unet, prop_attn=True)
    unet(**tiny_inputs()).sample.square().sum().backward()
    to_k = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    assert to_k.weight.grad.isfinite().all() and to_k.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_one_graph(unet):
    torch.compiler.reset()
    apply_tome(unet, prop_attn=True)
    expected = run(unet)[0]
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        out = compiled(**{**tiny_inputs(), "timestep": torch.tensor(900)}).sample
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(prop_attn=1), "write prop_attn=True"),
        (dict(prop_attn=True, targets=["mlp"]), "write targets=['attn']"),
        (dict(prop_attn=True, targets=["block"]), "targets are block"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ToMeError) as error:
        ToMeConfig(**options)
    assert said in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("targets", [["attn"], ["attn_kv"]])
@pytest.mark.parametrize(
    "family", ["PixArt-alpha, PixArt-sigma", "PixArt, older checkpoints", "DiT"]
)
def test_transformers_of_one_stream(family, targets):
    family = TRANSFORMERS[family]
    network, inputs = family.build(), family.inputs()
    outputs = []
    for options in (dict(ratio=0), dict(ratio=0.5), dict(ratio=0.5, prop_attn=True)):
        with apply_tome(network, targets=targets, **options):
            outputs.append(network(**inputs, return_dict=False)[0])
    assert outputs[2].isfinite().all()
    assert error(outputs[2], outputs[1]) > 1e-4
    assert error(outputs[2], outputs[0]) < 1


@pytest.mark.parametrize("family", ["Flux.1", "Stable Diffusion 3", "Wan 2.1, 2.2 (video)"])
def test_other_transformers_say_that_they_cannot(family):
    network = TRANSFORMERS[family].build()
    with pytest.raises(ToMeError, match="takes no mask to weigh keys by; write prop_attn=False"):
        apply_tome(network, prop_attn=True)


def test_attention_that_takes_no_mask_is_refused(unet):
    for block in unet.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block.attn1 = torch.nn.Identity()
    with pytest.raises(ToMeError, match="takes no mask to weigh keys by; write prop_attn=False"):
        apply_tome(unet, prop_attn=True)
