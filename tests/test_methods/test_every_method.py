# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What holds for every registered method."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_requests import SPECS, name_of, request, tokens

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.merging import IndexPlan, make_windows
from mmagic_tome.methods import build_method

every_method = pytest.mark.parametrize("spec", SPECS, ids=name_of)


def guidance_map_of(batch, seed=0):
    """Guidance map of a call with ``batch`` entries; None for an odd batch."""
    guidance = torch.rand(batch // 2, 9, 7, generator=torch.Generator().manual_seed(seed))
    return None if batch % 2 else guidance


def removed_by(spec, tokens, ratio, ask):
    """How many tokens a method removes, at most ('threshold') or exactly, as documented."""
    method = build_method(spec)
    name = name_of(spec).split("-")[0]
    r = method.removed(tokens, ratio, ask)
    if name in ("todo", "downsample"):
        factor = 2 if name == "todo" else method.factor
        r = tokens - math.ceil(ask.height / factor) * math.ceil(ask.width / factor)
    elif name == "pitome":
        r = min(r, tokens // 2)  # its config allows no ratio above 0.5
    elif name == "toma":
        windows = make_windows(ask.height, ask.width, method.window, torch.device("cpu"))
        r = windows.count * min(r // windows.count, windows.size - 1)
    return r


@every_method
@settings(deadline=None, max_examples=15)
@given(
    grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    batch=st.integers(1, 4),
    ratio=st.floats(0, 0.75),
    seed=st.integers(0, 999),
)
def test_invariants(spec, grid, batch, ratio, seed):
    height, width = grid
    count = height * width
    x = tokens(batch, height, width, seed=seed)
    before = x.clone()
    guidance = guidance_map_of(batch, seed)
    ask = request(height, width, seed=seed, guidance_map=guidance)
    state = torch.get_rng_state()
    plan = build_method(spec).plan(x, ratio, ask)
    assert torch.equal(torch.get_rng_state(), state)  # no global random numbers
    assert torch.equal(x, before)
    most = removed_by(spec, count, ratio, ask)
    fewest = 0 if "threshold" in name_of(spec) else most
    if plan is None:
        assert ratio == 0 or fewest == 0
        return
    assert ratio > 0 and max(fewest, 1) <= count - plan.num_slots <= most
    assert (plan.batch, plan.num_tokens) == (batch, count)

    # Every token has one slot, every slot a token that represents it.
    assert plan.slot.shape == (batch, count)
    assert plan.slot.min() >= 0 and plan.slot.max() < plan.num_slots
    own = plan.slot.gather(1, plan.representative)
    right = own == torch.arange(plan.num_slots).expand(batch, -1)
    if isinstance(plan, IndexPlan):
        assert right.all() and plan.size.min() >= 1
    else:  # a token belongs to several slots
        every = torch.full((batch,), float(count))
        torch.testing.assert_close(plan.size.sum(1), every, rtol=1e-3, atol=1e-3)

    # What is the same everywhere stays the same.
    flat = torch.tensor([3.0, -2, 0.5]).expand(batch, count, 3)
    merged = plan.merge(flat)
    assert merged.shape == (batch, plan.num_slots, 3)
    torch.testing.assert_close(merged, flat[:, : plan.num_slots], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plan.unmerge(merged), flat, rtol=1e-3, atol=1e-3)

    # The same again is the same again.
    again = build_method(spec).plan(x, ratio, ask)
    assert torch.equal(again.merge(x), plan.merge(x))
    assert torch.equal(again.unmerge(merged), plan.unmerge(merged))

    # Entries in another order, each with its own guidance map: the same results in that order.
    # Entry i and entry i + B / 2 are the two halves of a guided image.
    flipped = None if guidance is None else guidance.flip(0)
    ask = request(height, width, seed=seed, guidance_map=flipped)
    other = build_method(spec).plan(x.flip(0), ratio, ask)
    back = other.unmerge(other.merge(x.flip(0))).flip(0)
    # A pseudo-inverse enlarges what another order of a sum changes.
    slack = dict(rtol=1e-3, atol=1e-3) if "pinv" in name_of(spec) else {}
    torch.testing.assert_close(back, plan.unmerge(plan.merge(x)), **slack)


def spread_out(grid):
    """Tokens without near-ties: (1, N, C), exact in bfloat16.

    Every 2 x 2 cell has a direction of its own. In every other cell all four tokens are the same,
    in the others they lean out of it to all sides; all cells differ in how much they have in
    common with the rest. With 3/8 removed the copies merge and the others do not.
    """
    height, width = grid
    token = torch.arange(height * width)
    row, column = token // width, token % width
    cell, corner = (row // 2) * (width // 2) + column // 2, (row % 2) * 2 + column % 2
    cells = (height // 2) * (width // 2)
    x = torch.zeros(1, height * width, cells + 5)
    x[0, token, cell] = 2.0
    x[0, token, cells + corner] = torch.tensor([0.5, 1.0, 1.5, 2.0])[corner] * (cell % 2)
    x[0, :, -1] = cell / 8
    return x


@every_method
@settings(deadline=None, max_examples=12)
@given(
    grid=st.sampled_from([(4, 8), (8, 4), (4, 4), (4, 12), (8, 8)]),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.25, 1, 8]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_half_precision_agrees(spec, grid, seed, scale, dtype):
    """Tokens in half precision, and a float32 network that is called under autocast."""
    if "importance" in name_of(spec):
        # Its destinations lie anywhere: two may be copies of each other, and equally near.
        grid, seed = (4, 8), 1
    x = spread_out(grid) * scale
    assert torch.equal(x.to(dtype).float(), x)
    count = x.shape[1]
    guidance = torch.arange(float(count)).roll(seed % count).view(1, *grid)
    ask = request(*grid, seed=seed, guidance_map=guidance)
    plan = build_method(spec).plan(x, 3 / 8, ask)
    half = build_method(spec).plan(x.to(dtype), 3 / 8, ask)
    assert plan.num_slots == half.num_slots
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    tolerance = dict(rtol=tolerance, atol=tolerance * scale)
    merged = half.merge(x.to(dtype))
    back = half.unmerge(merged)
    assert merged.dtype == back.dtype == dtype
    # Not the merged tokens: some methods number their slots by similarity.
    torch.testing.assert_close(back.float(), plan.unmerge(plan.merge(x)), **tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        other = build_method(spec).plan(x, 3 / 8, ask)
        merged = other.merge(x)
    assert merged.dtype == x.dtype
    assert torch.equal(other.slot, plan.slot)
    torch.testing.assert_close(merged, plan.merge(x), rtol=2e-2, atol=2e-2 * scale)


@every_method
def test_tokens_that_are_alike(spec):
    """All tokens alike, or all zero: everything ties, nothing breaks."""
    for x in (torch.zeros(2, 64, 4), torch.ones(2, 64, 4)):
        plan = build_method(spec).plan(x, 0.5, request(8, 8, guidance_map=torch.zeros(1, 8, 8)))
        if plan is None:
            assert "threshold" in name_of(spec)
            continue
        torch.testing.assert_close(plan.unmerge(plan.merge(x)), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (dict(type="tofu", prune_depth=2), "at least 0 and at most 1; write prune_depth=1"),
        (dict(type="tofu", merge="mean"), "it has prune_depth"),
        (dict(type="threshold", threshold=1.5), "write threshold=1"),
        (dict(type="todo", downsample_factor_level_2=2.6), "write downsample_factor_level_2=3"),
        (dict(type="downsample", factor=1), "write factor=2"),
        (dict(type="toma", window=64), "write window=32"),
        (dict(type="toma", temperature=0), "above 0 and at most 100; write temperature=0.03"),
        (dict(type="toma", unmerge="inverse"), "transpose, pinv"),
        (dict(type="sito", sim_beta=float("inf")), "write sim_beta=1"),
        (dict(type="pitome", margin=True), "write margin=0.9"),
        (dict(type="pitome", alpha=-1), "write alpha=0"),
        (dict(type="importance", destinations=0), "write destinations=0.25"),
        (dict(type="sito", noise=1), "it has noise_alpha, sim_beta"),
        (dict(type="tome", window=4), "it has none"),
        (dict(name="tome"), "names no method: write its name under 'type'"),
        (dict(type=None), "unknown method None"),
        ("CA-ToMe", "did you mean 'threshold'"),
        ("pitom", "did you mean 'pitome'"),
        ("x", "unknown method 'x': Known: downsample, importance, pitome"),
    ],
)
def test_bad_options_are_named(spec, said):
    with pytest.raises(ToMeError) as error:
        build_method(spec)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_method_that_merges_pairs_has_a_ceiling():
    assert ToMeConfig(method="pitome", ratio=0.5).ceiling == 0.5
    assert ToMeConfig(method="pitome", sx=2, sy=1, ratio=0.5).ceiling == 0.5
    for ratio in (0.6, dict(downsample={1: 0.6})):
        with pytest.raises(ToMeError, match=r"0\.6.*([Ww]rite|ratio=) ?0\.5"):
            ToMeConfig(method="pitome", ratio=ratio, targets=["attn", "mlp"])
    with pytest.raises(ToMeError, match=r"0\.75"):
        ToMeConfig(method="tome", ratio=0.8)
