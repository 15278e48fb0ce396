# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Methods that choose destinations of their own, or none: sito, pitome, importance, todo."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from method_requests import request, tokens

from mmagic_tome.merging import PrunedPlan
from mmagic_tome.methods import build_method
from mmagic_tome.methods import importance as importance_module
from mmagic_tome.methods.importance import guidance_map_on_grid
from mmagic_tome.methods.pitome import energy
from mmagic_tome.methods.sito import gaussian, similarity_mass

grids = st.tuples(st.integers(2, 9), st.integers(2, 9))


def cosines(x):
    unit = F.normalize(x.double(), dim=-1)
    return unit @ unit.transpose(-1, -2)


# --- sito ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(grids, st.integers(0, 10**6))
def test_sito_by_brute_force(grid, seed):
    height, width = grid
    x, ask = tokens(2, *grid, seed=seed), request(*grid, seed=seed)
    count = height * width
    plan = build_method(dict(type="sito", noise_alpha=0)).plan(x, 0.5, ask)
    similarity = cosines(x)
    mass = similarity_mass(x).double()
    torch.testing.assert_close(mass, similarity.sum(-1), rtol=1e-5, atol=1e-5)
    r = min(count // 2, count - ask.cells)
    for b in range(2):
        mass = similarity[b].sum(-1)
        bases = []
        for i in range(height // 2):
            for j in range(width // 2):
                cell = [(2 * i + p) * width + 2 * j + q for p in (0, 1) for q in (0, 1)]
                bases.append(max(cell, key=lambda t: mass[t].item()))
        others = [t for t in range(count) if t not in bases]
        best = similarity[b][others][:, bases].max(-1)
        pruned = best.values.argsort(descending=True)[:r].tolist()
        kept = {*range(count)} - {others[k] for k in pruned}
        assert set(plan.representative[b].tolist()) == kept
        for k in pruned:  # recovered from the most similar base token
            base = bases[best.indices[k]]
            assert plan.slot[b, others[k]] == plan.slot[b, base]
            assert plan.representative[b, plan.slot[b, base]] == base


def test_sito_noise_changes_the_choice_with_the_draw():
    x = tokens(2, 16, 16)
    loud = build_method(dict(type="sito", noise_alpha=3))
    a, b = (loud.plan(x, 0.5, request(16, 16, seed=s)).representative for s in (1, 2))
    assert not torch.equal(a, b)
    mute = build_method(dict(type="sito", noise_alpha=0))
    a, b = (mute.plan(x, 0.5, request(16, 16, seed=s)).representative for s in (1, 2))
    assert torch.equal(a, b)


def test_sito_weights():
    """Only the two weights' ratio matters; without similarities the noise chooses alone."""
    x, other = tokens(1, 12, 12, seed=1), tokens(1, 12, 12, seed=2)

    def bases(tokens, **weights):
        method = build_method(dict(type="sito", **weights))
        return method.base_tokens(tokens, request(12, 12, seed=3))

    twice = bases(x, noise_alpha=1, sim_beta=2)
    assert torch.equal(twice, bases(x, noise_alpha=0.5))
    assert not torch.equal(twice, bases(x, noise_alpha=1))
    alone = bases(x, noise_alpha=1, sim_beta=0)
    assert torch.equal(alone, bases(other, noise_alpha=1, sim_beta=0))
    assert not torch.equal(bases(x), bases(other))


def test_gaussian_numbers_are_normal():
    sample = gaussian(request(4, 4, seed=5), 40_000)
    assert sample.isfinite().all()
    moments = [sample.mean(), sample.var(), (sample**3).mean(), (sample**4).mean()]
    torch.testing.assert_close(torch.stack(moments), torch.tensor([0.0, 1, 0, 3]), atol=0.1, rtol=0)


# --- pitome -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(grids, st.floats(0, 1), st.floats(0, 2), st.integers(0, 10**6))
def test_energy_by_brute_force(grid, margin, alpha, seed):
    x = tokens(2, *grid, seed=seed)
    similarity = cosines(x)
    below = alpha * (torch.exp(similarity - margin) - 1)
    # At the margin itself the two branches do not meet: leave out what rounds over it.
    if ((similarity - margin).abs() < 1e-6).any():
        return
    expected = torch.where(similarity >= margin, similarity, below).mean(-1)
    torch.testing.assert_close(energy(x, margin, alpha).double(), expected, rtol=1e-4, atol=1e-5)


def test_energy_in_chunks(monkeypatch):
    x = tokens(2, 8, 8)
    whole = energy(x, 0.5, 1)
    monkeypatch.setattr("mmagic_tome.methods.pitome._MAX_SCORES", 700)
    torch.testing.assert_close(energy(x, 0.5, 1), whole)


@settings(deadline=None, max_examples=25)
@given(grids, st.floats(0.05, 0.5), st.integers(0, 10**6))
def test_pitome_by_brute_force(grid, ratio, seed):
    x, ask = tokens(2, *grid, seed=seed), request(*grid, seed=seed)
    plan = build_method("pitome").plan(x, ratio, ask)
    count = x.shape[1]
    r = min(int(count * ratio), count // 2)
    if r == 0:
        assert plan is None
        return
    similarity = cosines(x)
    ranking = energy(x, 0.9 * (1 - 3 / 4), 1).argsort(dim=1, descending=True)
    for b in range(2):
        order = ranking[b].tolist()
        a, c = order[: 2 * r : 2], order[1 : 2 * r : 2]
        for token in a:
            partner = max(c, key=lambda t: similarity[b, token, t].item())
            assert plan.slot[b, token] == plan.slot[b, partner]
        alone = plan.size[b, plan.slot[b, order[2 * r :]]]
        assert (alone == 1).all()  # the protected


# --- importance ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(grids, st.floats(0.05, 0.75), st.integers(0, 10**6))
def test_importance_keeps_what_the_text_moves(grid, ratio, seed):
    height, width = grid
    count = height * width
    x = tokens(2, *grid, seed=seed)
    guidance = torch.rand(1, *grid, generator=torch.Generator().manual_seed(seed))
    ask = request(*grid, seed=seed, guidance_map=guidance)
    method = build_method("importance")
    plan = method.plan(x, ratio, ask)
    r = method.removed(count, ratio, ask)
    if r == 0:
        assert plan is None
        return
    pool = min(int(1.4 * (count - r)), count)
    order = guidance.flatten().argsort(descending=True).tolist()
    important, others = order[:pool], order[pool:]
    destinations = max(1, min(int(0.25 * count), count - r))
    for b in range(2):
        # Slots are numbered destinations first; those are important tokens.
        slot = plan.slot[b].tolist()
        is_destination = [t for t in important if slot[t] < destinations]
        assert len({slot[t] for t in is_destination}) == destinations
        # All unimportant ones merge.
        assert all(slot[t] < destinations for t in others)
        # Those that stay alone are important ones that are no destinations.
        alone = [t for t in range(count) if slot[t] >= destinations]
        assert set(alone) <= set(important)
        assert len(alone) == count - r - destinations


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(3, 4), (4, 4), (4, 5)]), st.integers(0, 10**6), st.integers(2, 6))
def test_importance_agrees_in_half_precision(dtype, grid, seed, step):
    """On any tokens and guidance in which no choice is nearly a tie."""
    height, width = grid
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, height * width, 4, generator=generator).bfloat16().half().float()
    guidance = torch.randperm(height * width, generator=generator).view(1, *grid).float()
    ask = request(*grid, seed=seed, guidance_map=guidance, step=step)
    method = build_method("importance")
    edges = importance_module.nearest_destination
    with (
        patch.object(importance_module, "nearest_destination", wraps=edges) as drawn,
        patch.object(importance_module, "strongest", wraps=importance_module.strongest) as cut,
    ):
        plan = method.plan(x, 3 / 8, ask)
    _, destinations, sources = drawn.call_args.args
    score, merging = cut.call_args.args
    nearest = cosines(x)[0, sources[0]][:, destinations[0]].sort(descending=True).values
    assume((nearest[:, 0] - nearest[:, 1] > 0.02).all())
    ranked = score[0].sort(descending=True).values
    assume(ranked[merging - 1] - ranked[merging] > 0.02)
    half = method.plan(x.to(dtype), 3 / 8, ask)
    assert torch.equal(half.slot, plan.slot)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    merged = half.merge(x.to(dtype))
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.float(), plan.merge(x), rtol=tolerance, atol=tolerance)


def test_importance_draws_the_same_destinations_for_both_halves():
    x = tokens(2, 8, 8)
    ask = request(8, 8, guidance_map=torch.rand(1, 8, 8), step=0)
    plan = build_method("importance").plan(x, 0.5, ask)
    assert isinstance(plan, PrunedPlan)  # step 0 is among the first two
    assert torch.equal(plan.representative[0, :16], plan.representative[1, :16])
    assert not torch.equal(plan.slot[0], plan.slot[1])


def test_importance_without_guidance_is_tome_and_prunes_at_first():
    x = tokens(3, 8, 8)
    late, first = request(8, 8, step=7), request(8, 8, step=1)
    method, tome = build_method("importance"), build_method("tome").plan(x, 0.5, late)
    torch.testing.assert_close(method.plan(x, 0.5, late).merge(x).sum(1), tome.merge(x).sum(1))
    assert isinstance(method.plan(x, 0.5, first), PrunedPlan)


def test_guidance_is_averaged_onto_the_grid_and_repeated_for_both_halves():
    guidance = torch.arange(32.0).view(2, 4, 4)
    on_grid = guidance_map_on_grid(request(2, 2, guidance_map=guidance), 4)
    by_hand = guidance.view(2, 2, 2, 2, 2).mean((2, 4)).flatten(1)
    assert torch.equal(on_grid, torch.cat([by_hand, by_hand]))
    assert guidance_map_on_grid(request(2, 2, guidance_map=guidance), 3) is None
    assert guidance_map_on_grid(request(2, 2), 4) is None


# --- todo and downsample ------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
@pytest.mark.parametrize("factor", [2, 3])
def test_todo_takes_every_kth_token(grid, factor):
    x = tokens(2, *grid)
    method = build_method(dict(type="todo", downsample_factor=factor))
    plan = method.plan(x, 0.01, request(*grid))
    image = x.view(2, *grid, -1)
    assert torch.equal(plan.merge(x), image[:, ::factor, ::factor].flatten(1, 2))
    up = image[:, ::factor, ::factor]
    up = up.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, : grid[0], : grid[1]]
    assert torch.equal(plan.unmerge(plan.merge(x)), up.flatten(1, 2))


def test_todo_leaves_coarser_levels_dense():
    x = tokens(1, 8, 8)
    assert build_method("todo").plan(x, 0.5, request(8, 8, level=1)) is None
    method = build_method(dict(type="todo", downsample_factor=1, downsample_factor_level_2=4))
    assert method.plan(x, 0.5, request(8, 8, level=0)) is None
    assert method.plan(x, 0.5, request(8, 8, level=2)).num_slots == 4


@pytest.mark.parametrize("factor", [2, 4])
def test_downsample_averages_squares(factor):
    x = tokens(2, 8, 12)
    plan = build_method(dict(type="downsample", factor=factor)).plan(x, 0.5, request(8, 12))
    image = x.transpose(1, 2).view(2, -1, 8, 12)
    expected = F.avg_pool2d(image, factor).flatten(2).transpose(1, 2)
    torch.testing.assert_close(plan.merge(x), expected)
