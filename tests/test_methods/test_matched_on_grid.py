# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Methods with ToMe's matching: prune, tofu, threshold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_requests import cosines, request, tokens
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_tome
from mmagic_tome.merging import MlerpPlan, PrunedPlan, regular_layout
from mmagic_tome.methods import build_method

GRIDS, SEEDS = st.tuples(st.integers(2, 9), st.integers(2, 9)), st.integers(0, 10**6)


@settings(deadline=None, max_examples=40)
@given(GRIDS, st.floats(0.05, 0.75), SEEDS)
def test_prune_and_tofu_group_as_tome_does(grid, ratio, seed):
    x, ask = tokens(2, *grid, seed=seed), request(*grid, seed=seed)
    plan = build_method("tome").plan(x, ratio, ask)
    for spec in ("prune", "tofu"):
        other = build_method(spec).plan(x, ratio, ask)
        assert (plan is None) == (other is None)
        if plan is not None:
            assert torch.equal(plan.slot, other.slot)
            destinations, _ = ask.layout()
            first = other.representative[:, : len(destinations)]
            assert torch.equal(first, destinations.expand(2, -1))


def test_tofu_prunes_early_and_merges_late():
    def kinds(**options):
        method = build_method(dict(type="tofu", **options))
        asks = [request(8, 8, depth=depth) for depth in range(4)]
        return [type(method.plan(tokens(1, 8, 8), 0.5, ask)) for ask in asks]

    assert kinds() == [PrunedPlan, PrunedPlan, MlerpPlan, MlerpPlan]
    assert kinds(prune_depth=0) == [MlerpPlan] * 4
    assert kinds(prune_depth=1) == [PrunedPlan] * 4


# --- threshold ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(GRIDS, st.floats(-0.5, 0.999), SEEDS)
def test_threshold_by_brute_force(grid, threshold, seed):
    x, ask = tokens(3, *grid, seed=seed), request(*grid, seed=seed)
    method = build_method(dict(type="threshold", threshold=threshold))
    plan = method.plan(x, 0.75, ask)
    destinations, sources = ask.layout()
    best = cosines(x)[:, sources][:, :, destinations].amax(-1)
    r = min(int((best >= threshold).sum(1).max()), int(x.shape[1] * 0.75))
    if r == 0:
        assert plan is None
        return
    assert plan.num_slots == x.shape[1] - r
    # Those that merge are the r most similar ones of every entry.
    shares = plan.size.gather(1, plan.slot) > 1
    for b in range(3):
        merged = [i for i, s in enumerate(sources.tolist()) if bool(shares[b, s])]
        assert set(merged) == set(best[b].argsort(descending=True)[:r].tolist())


# PyPI ca-tome: with --no-deps, since it asks for an old torch.


@pytest.mark.parametrize("threshold", [0.9, 0.7])
def test_threshold_agrees_with_its_authors_package(threshold):
    merge = pytest.importorskip("ca_tome.merge")
    removed = set()
    for seed in range(5):
        x = tokens(2, 8, 10, seed=seed)
        cache = dict(compute_on=[0], merge=None, unmerge=None)
        theirs, back = merge.bipartite_soft_matching_random2d(
            x, 10, 8, 2, 2, threshold, cache, 0, no_rand=True
        )
        ask = request(8, 10, layout=lambda: regular_layout(8, 10).select(0))
        plan = build_method(dict(type="threshold", threshold=threshold)).plan(x, 0.75, ask)
        assert plan.num_slots == theirs(x).shape[1]
        torch.testing.assert_close(plan.unmerge(plan.merge(x)), back(theirs(x)))
        removed.add(80 - plan.num_slots)
    assert removed != {60}  # the threshold decides, not the number of sources


@torch.no_grad()
def test_cached_matching_agrees_with_its_authors_package():
    """A whole denoising run of a network, with matching at listed steps only."""
    patch = pytest.importorskip("ca_tome.patch")
    at, threshold = [0, 2, 3], 0.6
    unet, inputs = tiny_unet(levels=2), tiny_inputs()
    sample = inputs.pop("sample")
    steps = [(sample + 0.2 * i, torch.tensor(900 - 100 * i)) for i in range(6)]

    options = dict(ratio=0.75, exact_matching=True, plan_interval=at, max_downsample=2)
    options.update(use_rand=False, prop_attn=False, targets=["attn", "crossattn", "mlp"])
    method = dict(type="threshold", threshold=threshold)
    with apply_tome(unet, method=method, **options) as handle:
        ours = [unet(x, **{**inputs, "timestep": t}).sample for x, t in steps]
        assert {row["plans"] for row in handle.stats()} == {len(at)}
        shares = [row["kept"] / row["tokens"] for row in handle.stats()]
        assert min(shares) < 0.9 and max(shares) > 0.3

    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    where = dict(use_rand=False, merge_mlp=True, merge_crossattn=True, max_downsample=2)
    patch.apply_patch(unet, compute_on=at, r=threshold, **where)
    for step, (x, t) in enumerate(steps):
        for block in blocks:
            block.inference_step = step
        theirs = unet(x, **{**inputs, "timestep": t}).sample
        torch.testing.assert_close(ours[step], theirs, rtol=1e-4, atol=1e-5)
