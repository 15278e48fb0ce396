# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What holds for every registered method."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_requests import SPECS, name_of, request, tokens

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.merging import bipartite_match
from mmagic_tome.methods import METHODS, Method, build_method, register_method

every_method = pytest.mark.parametrize("spec", SPECS, ids=name_of)


def removed_by(spec, tokens, ratio, ask):
    """How many tokens a method removes, as documented."""
    method = build_method(spec)
    if name_of(spec).startswith("todo"):
        factor = method.factors[0]
        return tokens - math.ceil(ask.height / factor) * math.ceil(ask.width / factor)
    return method.removed(tokens, ratio, ask)


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
    ask = request(height, width, seed=seed)
    state = torch.get_rng_state()
    plan = build_method(spec).plan(x, ratio, ask)
    assert torch.equal(torch.get_rng_state(), state)  # no global random numbers
    assert torch.equal(x, before)
    removed = removed_by(spec, count, ratio, ask)
    if plan is None:
        assert ratio == 0 or removed == 0
        return
    assert ratio > 0 and 0 < removed == count - plan.num_slots
    assert (plan.batch, plan.num_tokens) == (batch, count)

    # Every token has one slot, every slot a token that represents it.
    assert plan.slot.shape == (batch, count)
    assert plan.slot.min() >= 0 and plan.slot.max() < plan.num_slots
    own = plan.slot.gather(1, plan.representative)
    assert torch.equal(own, torch.arange(plan.num_slots).expand(batch, -1))
    assert plan.size.min() >= 1

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

    # Entries in another order: the same results in that order.
    other = build_method(spec).plan(x.flip(0), ratio, ask)
    back = other.unmerge(other.merge(x.flip(0))).flip(0)
    torch.testing.assert_close(back, plan.unmerge(plan.merge(x)))


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
    x = spread_out(grid) * scale
    assert torch.equal(x.to(dtype).float(), x)
    ask = request(*grid, seed=seed)
    plan = build_method(spec).plan(x, 3 / 8, ask)
    half = build_method(spec).plan(x.to(dtype), 3 / 8, ask)
    assert plan.num_slots == half.num_slots
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    tolerance = dict(rtol=tolerance, atol=tolerance * scale)
    merged = half.merge(x.to(dtype))
    back = half.unmerge(merged)
    assert merged.dtype == back.dtype == dtype
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
        plan = build_method(spec).plan(x, 0.5, request(8, 8))
        torch.testing.assert_close(plan.unmerge(plan.merge(x)), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
@pytest.mark.parametrize("factor", [2, 3])
def test_todo_keeps_every_kth_token(grid, factor):
    x = tokens(2, *grid)
    method = build_method(dict(type="todo", downsample_factor=factor))
    plan, image = method.plan(x, 0.01, request(*grid)), x.view(2, *grid, -1)
    up = image[:, ::factor, ::factor]
    assert torch.equal(plan.merge(x), up.flatten(1, 2))
    up = up.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, : grid[0], : grid[1]]
    assert torch.equal(plan.unmerge(plan.merge(x)), up.flatten(1, 2))


def test_todo_leaves_coarser_levels_unmerged():
    x = tokens(1, 8, 8)
    assert build_method("todo").plan(x, 0.5, request(8, 8, level=1)) is None
    method = build_method(dict(type="todo", downsample_factor=1, downsample_factor_level_2=4))
    assert method.plan(x, 0.5, request(8, 8, level=0)) is None
    assert method.plan(x, 0.5, request(8, 8, level=2)).num_slots == 4


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (dict(type="todo", downsample_factor_level_2=2.6), "write downsample_factor_level_2=3"),
        (dict(type="todo", downsample_factor=17), "write downsample_factor=16"),
        (dict(type="tome", window=4), "it has none"),
        (dict(name="tome"), "names no method: write its name under 'type'"),
        (dict(type=None), "unknown method None"),
        ("tomesd", "did you mean 'tome'"),
        ("token-downsampling", "did you mean 'todo'"),
        ("x", "unknown method 'x': Known: todo, tome"),
        ("tofu", "'tofu' is no longer offered: at the same speed method='tome' is closer"),
        (dict(type="toma", window=4), "'toma' is no longer offered"),
    ],
)
def test_bad_options_are_named(spec, said):
    with pytest.raises(ToMeError) as error:
        build_method(spec)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def pairs():
    """A method of a user's own, that merges pairs."""

    @register_method("pairs")
    class Pairs(Method):
        ceiling = 0.5

        def match(self, metric, r, request):
            return bipartite_match(metric, *request.layout(), r, exact=request.exact)

    yield Pairs
    del METHODS["pairs"]


def test_a_method_of_ones_own_may_have_a_ceiling(pairs):
    assert isinstance(build_method("pairs"), pairs)
    assert ToMeConfig(method="pairs", ratio=0.5).ceiling == 0.5
    assert ToMeConfig(method="pairs", sx=2, sy=1, ratio=0.5).ceiling == 0.5
    for ratio in (0.6, dict(downsample={1: 0.6})):
        with pytest.raises(ToMeError, match=r"0\.6.*([Ww]rite|ratio=) ?0\.5"):
            ToMeConfig(method="pairs", ratio=ratio, targets=["attn", "mlp"])
    for targets, ceiling in (("auto", "0.9375"), ("attn", "0.75"), (["attn_kv", "mlp"], "0.75")):
        with pytest.raises(ToMeError, match=f"above the ceiling {ceiling}.*write ratio={ceiling}"):
            ToMeConfig(targets=targets, ratio=0.95)
