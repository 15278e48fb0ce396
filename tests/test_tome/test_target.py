# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the targets of a merged network receive, and what it returns."""

import copy

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.patch import find_patch
from mmagic_tome.tome.state import TomePatch

EVERYTHING = dict(max_downsample=8, targets=["attn", "crossattn", "mlp"])


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=3)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


@torch.no_grad()
def run(unet, **changes):
    return unet(**{**tiny_inputs(), **changes}).sample


class Seen:
    """Number of tokens that modules inside the blocks receive."""

    def __init__(self, unet, suffix):
        self.tokens = []
        for name, module in unet.named_modules():
            if name.endswith(suffix):
                module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.tokens.append((args[0] if args else kwargs["hidden_states"]).shape[1])


def context_of(unet):
    """What is known during a call."""
    return find_patch(unet, TomePatch).context


def test_the_baseline_is_not_trivial(unet):
    # Everything below compares outputs; zeros would make all of it true.
    out = run(unet)
    assert out.std() > 0.1
    assert (run(unet, timestep=torch.tensor(1)) - out).abs().max() > 1e-3


def test_tokens_fall_and_the_output_changes_a_little(unet):
    baseline = run(unet)
    with apply_tome(unet, ratio=0.5) as handle:
        seen = Seen(unet, "attn1.to_q")
        merged = run(unet)
        assert seen.tokens.count(128) == 3 and 256 not in seen.tokens
        assert {row["kept"] for row in handle.stats()} == {128}
    difference = (merged - baseline).pow(2).mean().sqrt() / baseline.std()
    assert 1e-3 < difference < 0.6


def test_each_kind_of_target_merges_what_it_says(unet):
    inner = {"attn": "attn1.to_q", "crossattn": "attn2.to_q", "mlp": "ff.net.0.proj"}
    for kind in inner:
        network = copy.deepcopy(unet)
        seen = {other: Seen(network, suffix) for other, suffix in inner.items()}
        apply_tome(network, ratio=0.25, max_downsample=4, targets=[kind])
        run(network)
        for other in inner:
            whole = {256, 64, 16}
            assert set(seen[other].tokens) == ({192, 48, 12} if other == kind else whole)


def test_equals_tomesd_on_the_same_layout(unet):
    import tomesd

    inputs = tiny_inputs()
    with apply_tome(unet, ratio=0.5, exact_matching=True, use_rand=False, **EVERYTHING):
        ours = run(unet)
    where = dict(max_downsample=8, merge_crossattn=True, merge_mlp=True)
    tomesd.apply_patch(unet, ratio=0.5, use_rand=False, **where)
    with torch.no_grad():  # tomesd needs the sample as a positional argument
        theirs = unet(inputs.pop("sample"), **inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_same_seed_same_output_and_untouched_rng(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    state = torch.random.get_rng_state()
    first = run(unet)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(3)
    run(unet, timestep=torch.tensor(20))
    assert torch.equal(run(unet), first)
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    assert torch.equal(run(unet), first)
    apply_tome(unet, ratio=0.5, seed=1, **EVERYTHING)
    assert not torch.equal(run(unet), first)


def test_destinations_change_with_step_and_block(unet, monkeypatch):
    layouts = []
    layout = TomePatch.layout

    def watched(self, *request):
        out = layout(self, *request)
        layouts.append(out[0].clone())
        return out

    monkeypatch.setattr(TomePatch, "layout", watched)
    apply_tome(unet, ratio=0.5)
    run(unet, timestep=torch.tensor(10))
    run(unet, timestep=torch.tensor(11))
    assert len(layouts) == 6
    for i, a in enumerate(layouts):
        for b in layouts[:i]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize("batch", [2, 3])
def test_conditional_and_unconditional_halves_share_one_layout(unet, batch):
    # The same image in every row: with one layout for the batch all rows stay equal,
    # in tomesd an odd batch has to fall back to regular destinations.
    inputs = tiny_inputs(batch=1)
    inputs["sample"] = inputs["sample"].repeat(batch, 1, 1, 1)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(batch, 1, 1)
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    out = run(unet, **inputs)
    for row in out[1:]:
        torch.testing.assert_close(row, out[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])]
)
def test_timestep_in_any_form(unet, timestep):
    apply_tome(unet, ratio=0.5)
    expected = run(unet, timestep=torch.tensor(7))
    torch.testing.assert_close(run(unet, timestep=timestep), expected)


def test_positional_keyword_and_tuple_calls(unet):
    apply_tome(unet, ratio=0.5)
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = unet(**inputs).sample
        args = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
        assert torch.equal(unet(*args).sample, expected)
        assert torch.equal(unet(*args, return_dict=False)[0], expected)


@pytest.mark.parametrize("size", [(32, 32), (12, 20), (8, 40), (20, 12)])
def test_sizes_change_between_calls(unet, size):
    handle = apply_tome(unet, ratio=0.5, **EVERYTHING)
    for current in ((16, 16), size, (16, 16)):
        out = run(unet, **tiny_inputs(size=current))
        assert out.isfinite().all() and out.shape[-2:] == current
        tokens = {row["downsample"]: row["tokens"] for row in handle.stats()}
        assert tokens[1] == current[0] * current[1]


@pytest.mark.parametrize("size", [(17, 90), (33, 31), (7, 5)])
def test_odd_grids(size):
    # One level without down-sampling, since diffusers wants multiples of its factor.
    network = tiny_unet(levels=1)
    handle = apply_tome(network, ratio=0.5)
    inputs = tiny_inputs(size=size)
    assert run(network, **inputs).isfinite().all()
    tokens = size[0] * size[1]
    assert {row["kept"] for row in handle.stats()} == {tokens - tokens // 2}


def test_grid_without_a_complete_cell_stays_unmerged():
    network = tiny_unet(levels=1)
    inputs = tiny_inputs(size=(1, 9))
    baseline = run(network, **inputs)
    handle = apply_tome(network, ratio=0.5)
    assert torch.equal(run(network, **inputs), baseline)
    assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(9, 9)}


def test_chunked_feed_forward_is_refused(unet):
    for block in unet.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(16, dim=1)
    run(unet)
    apply_tome(unet, targets=["attn", "mlp"])
    with pytest.raises(ToMeError, match="leave 'mlp' out of targets"):
        run(unet)
    apply_tome(unet)
    assert run(unet).isfinite().all()


def test_attention_mask_over_image_tokens_is_refused(unet):
    apply_tome(unet)
    with pytest.raises(ToMeError, match="attention_mask"):
        run(unet, attention_mask=torch.ones(2, 256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(unet, dtype):
    unet.to(dtype)
    inputs = tiny_inputs()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    baseline = run(unet, **inputs)
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    out = run(unet, **inputs)
    assert out.dtype == dtype and out.isfinite().all() and not torch.equal(out, baseline)


def test_autocast(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    expected = run(unet)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(unet)
    assert not torch.equal(found, expected)
    assert (found.float() - expected).pow(2).mean().sqrt() < 0.5 * expected.std()


def test_nothing_of_a_call_is_kept(unet):
    apply_tome(unet, ratio=0.5, plan_interval=2, residual=True, share_plans=True)
    seen = []
    unet.up_blocks[-1].register_forward_hook(lambda *_: seen.append(dict(vars(context_of(unet)))))
    for _ in range(2):
        run(unet)
    during, after = seen[0], vars(context_of(unet))
    assert during["running"] and during["grid"] == (16, 16)
    assert during["step_key"] is not None and during["network"] is unet
    assert during["layouts"] and during["shared"]
    assert not after["running"]
    for name in ("config", "step_key", "grid", "network"):
        assert after[name] is None, name
    for name in ("layouts", "shared", "plans", "pending"):
        assert not after[name], name


@pytest.mark.parametrize(
    ("options", "held_at_ff"),
    [
        ({}, False),
        (dict(targets=["attn", "mlp"]), True),
        (dict(plan_interval=2, residual=True), False),
    ],
)
def test_plans_are_freed_before_the_feed_forward(unet, options, held_at_ff):
    apply_tome(unet, **options)
    held = []
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.ff.net[0].register_forward_pre_hook(lambda *_: held.append(bool(context_of(unet).plans)))
    run(unet)
    assert held == [held_at_ff]


def test_peak_memory_is_never_above_that_of_the_baseline():
    """To within the byte per cell that says where destinations are."""
    from mmagic_tome.lab.measure import peak_memory

    unet = tiny_unet(levels=2, block_out_channels=(64, 64), norm_num_groups=8)
    inputs = tiny_inputs(size=32)

    @torch.no_grad()
    def peak():
        return peak_memory(lambda: unet(**inputs).sample, "cpu")[0]

    baseline = peak()
    blocks, cells = 3, 16 * 16
    for options in ({}, dict(targets=["attn", "mlp"]), dict(targets="block"), dict(use_rand=False)):
        with apply_tome(unet, ratio=0.5, **options):
            assert peak() <= baseline + blocks * cells + 64, options
