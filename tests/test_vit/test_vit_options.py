# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the options of token merging in vision transformers do."""

import copy

import pytest
import torch
from vits import BIASES, LAYERS, build, forget_positions, inputs, result, tiny_timm

from mmagic_tome.merging import proportional
from mmagic_tome.merging.sequence import combine, match_tokens
from mmagic_tome.vit import apply_tome_vit, find_vit


@pytest.mark.parametrize("metric", ["keys", "queries", "values", "features", "attention"])
@pytest.mark.parametrize("name", ["vit", "timm-options", "videomae"])
def test_metrics_measure_what_they_say(name, metric):
    """The matching of the first block, made again from what a block computes densely."""
    model, arguments = build(name), inputs(name)
    vit, seen = find_vit(model), {}
    block = vit.blocks[0]
    hooks = [
        block.norm.register_forward_pre_hook(lambda m, a: seen.update(features=a[0])),
        block.output.register_forward_hook(
            lambda m, a, y: seen.update(attention=y if torch.is_tensor(y) else y[0], x=a[0])
        ),
    ]
    model(**arguments)
    for hook in hooks:
        hook.remove()
    x, attention = seen["x"], block.attention
    if name != "timm-options":
        names = {"vit": "q_proj k_proj v_proj", "videomae": "query key value"}[name].split()
        kinds = ("queries", "keys", "values")
        heads = {kind: getattr(attention, part)(x) for kind, part in zip(kinds, names)}
    else:
        q, k, v = attention.qkv(x).chunk(3, -1)
        q, k = (
            norm(part.unflatten(-1, (2, 16))).flatten(2)
            for norm, part in ((attention.q_norm, q), (attention.k_norm, k))
        )
        heads = {"keys": k, "queries": q, "values": v}
    seen.update({k: (v[..., :16] + v[..., 16:]) / 2 for k, v in heads.items()})
    expected = match_tokens(seen[metric], 6, vit.prefix).slot
    handle = apply_tome_vit(model, r=[6], metric=metric, trace_source=True)
    model(**arguments)
    assert torch.equal(handle.source, expected)


def test_every_option_has_an_effect_and_sizes_add_up():
    model, arguments = build("vit"), inputs("vit")
    apply_tome_vit(model, r=6)
    default = result(model, arguments)
    for name, values in {
        "distance": ("dot", "euclidean", "softmax"),
        "combination": ("mean", "max", "drop"),
        "partition": ("sequential", "random"),
        "prop_attn": (False,),
    }.items():
        for value in values:
            handle = apply_tome_vit(model, r=6, **{name: value})
            state = torch.get_rng_state()
            changed = result(model, arguments)
            assert torch.equal(torch.get_rng_state(), state)
            assert not torch.allclose(changed, default, rtol=1e-4, atol=1e-5), value
            assert handle.size.sum(1).tolist() == [37, 37]
            assert torch.equal(result(model, arguments), changed)


@pytest.mark.parametrize("combination", ["weighted", "mean", "max", "drop"])
def test_is_the_block_of_the_paper(combination):
    """One merged block against the same computed with merging in the middle of it."""
    model, arguments = build("vit"), inputs("vit")
    vit, seen = find_vit(model), {}
    block = vit.blocks[0]
    hook = block.norm.register_forward_pre_hook(lambda m, a: seen.update(features=a[0]))
    model(**arguments)
    hook.remove()
    handle = apply_tome_vit(model, r=[6], metric="features", combination=combination, unmerge=False)
    out = {}
    hook = block.module.register_forward_hook(lambda m, a, y: out.update(y=y))
    result(model, arguments)
    hook.remove()
    handle.remove()
    plan = match_tokens(seen["features"], 6, vit.prefix)
    x = combine(plan, seen["features"], None, combination)
    expected = x + block.module.mlp(block.norm(x))
    torch.testing.assert_close(out["y"], expected, rtol=1e-4, atol=1e-5)


def test_output_has_its_dense_shape_when_unmerged():
    model, arguments = build("vit").vit, inputs("vit")
    handle = apply_tome_vit(model, r=6, trace_source=True)
    merged = model(**arguments).last_hidden_state
    assert merged.shape[1] == 37 - 4 * 6
    copied = handle.unmerge(merged)
    apply_tome_vit(model, r=6, unmerge=True)
    torch.testing.assert_close(model(**arguments).last_hidden_state, copied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BIASES)
def test_half_precision_and_autocast(name, dtype):
    # Patches that are the same: another choice of what merges, which rounding may bring about,
    # changes nothing, and neither does merging.
    arguments = inputs(name, redundant=True)
    for combination in ("weighted", "mean", "max", "drop"):
        model = build(name)
        forget_positions(model)
        reference = result(model, arguments)
        handle = apply_tome_vit(model, r=6, combination=combination)
        result(model, arguments)
        sizes = handle.size.sum(1)
        with torch.autocast("cpu", dtype=dtype):
            assert (result(model, arguments).float() - reference).norm() < 0.05 * reference.norm()
        model.to(dtype)
        out = result(model, {k: v.to(dtype) for k, v in arguments.items()})
        assert out.dtype == dtype and torch.equal(handle.size.sum(1), sizes)
        assert handle.size.dtype == torch.float32 and handle.tokens[-1][0] > handle.tokens[-1][1]
        assert (out.float() - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize("name", ["vit", "timm", "videomae"])
def test_fused_attention_stays_and_gets_a_bias_per_token(name, monkeypatch):
    model, arguments = build(name, "sdpa"), inputs(name)
    handle, given = apply_tome_vit(model, r=[0, 5, 3, 0]), []
    fused = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, attn_mask=None, **kwargs):
        given.append((key.shape[2], attn_mask))
        return fused(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    model(**arguments)
    tokens = [before for before, _ in handle.tokens]
    assert [count for count, _ in given] == tokens
    # Before anything is merged the kernel is that of the dense model, without a mask.
    assert [mask is None for _, mask in given] == [True, True, False, False]
    for (_, mask), count in zip(given[2:], tokens[2:]):
        assert mask.shape == (2, 1, 1, count)  # never one number for every pair of tokens
        # Each is the logarithm of a size, and the sizes are those of all patches.
        assert torch.equal(mask.exp().round().sum((1, 2, 3)), torch.full((2,), float(tokens[0])))


@pytest.mark.parametrize("name", ["timm", "vit"])
def test_other_sizes_odd_counts_and_one_image(name):
    model = tiny_timm(dynamic_img_size=True) if name == "timm" else build(name)
    handle = apply_tome_vit(model, r=7)
    # 1 + 5 x 7 = 36 and 1 + 36 = 37 tokens, one more than there is to merge, and back.
    for height, width in ((24, 24), (20, 28), (24, 24), (4, 12), (4, 4)):
        x = torch.randn(1, 3, height, width)
        arguments = (
            {"x": x} if name == "timm" else dict(pixel_values=x, interpolate_pos_encoding=True)
        )
        out = result(model, arguments)
        count = 1 + height * width // 16
        expected = []
        for _ in range(LAYERS):
            left = count - min(7, (count - 1) // 2)
            expected.append((count, left))
            count = left
        assert handle.tokens == expected and out.isfinite().all()
        # The same as in a model that has seen no other size.
        twin = copy.deepcopy(model)
        assert torch.equal(result(twin, arguments), out)


# --- proportional attention without a mask, as on a GPU ------------------------------------------


@pytest.mark.parametrize("name", BIASES)
def test_channels_do_what_the_mask_does_with_gradients(name, monkeypatch):
    model, arguments = build(name, "sdpa").double(), inputs(name)
    arguments = {key: x.double() for key, x in arguments.items()}
    apply_tome_vit(model, r=6)
    found = []
    for channels in (False, True):
        monkeypatch.setattr(proportional, "prefers_channels", lambda query, c=channels: c)
        model.zero_grad()
        with torch.enable_grad():
            output = result(model, arguments)
            output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


def test_attention_that_is_written_out_adds_the_mask(monkeypatch):
    monkeypatch.setattr(proportional, "prefers_channels", lambda query: True)
    found = []
    for attention in ("sdpa", "eager"):
        model, arguments = build("vit", attention), inputs("vit")
        apply_tome_vit(model, r=6)
        found.append(result(model, arguments))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
