# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Methods that choose destinations of their own, or none: sito, pitome, importance, todo."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_requests import cosines, request, tokens

from mmagic_tome.merging import PrunedPlan
from mmagic_tome.methods import build_method
from mmagic_tome.methods.importance import guidance_map_on_grid
from mmagic_tome.methods.pitome import energy
from mmagic_tome.methods.sito import similarity_mass

GRIDS, SEEDS = st.tuples(st.integers(2, 9), st.integers(2, 9)), st.integers(0, 10**6)


# --- sito ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(GRIDS, SEEDS)
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
        for i, j in itertools.product(range(0, height - 1, 2), range(0, width - 1, 2)):
            cell = [(i + p) * width + j + q for p in (0, 1) for q in (0, 1)]
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


def test_sito_weights():
    """Only the two weights' ratio matters; without similarities the noise chooses alone."""
    x, other = tokens(1, 12, 12, seed=1), tokens(1, 12, 12, seed=2)

    def bases(tokens, seed=3, **weights):
        method = build_method(dict(type="sito", **weights))
        return method.base_tokens(tokens, request(12, 12, seed=seed))

    twice = bases(x, noise_alpha=1, sim_beta=2)
    assert torch.equal(twice, bases(x, noise_alpha=0.5))
    # The unit of the noise is the spread of the similarities.
    assert (bases(x, noise_alpha=1) == bases(x, noise_alpha=0)).float().mean() < 0.6
    alone = bases(x, noise_alpha=1, sim_beta=0)
    assert torch.equal(alone, bases(other, noise_alpha=1, sim_beta=0))
    assert not torch.equal(alone, bases(x, noise_alpha=1, sim_beta=0, seed=4))
    assert torch.equal(bases(x, noise_alpha=0), bases(x, noise_alpha=0, seed=4))


# --- pitome -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(GRIDS, st.floats(0, 1), st.floats(0, 2), SEEDS)
def test_energy_by_brute_force(grid, margin, alpha, seed):
    x = tokens(2, *grid, seed=seed)
    similarity = cosines(x)
    below = alpha * (torch.exp(similarity - margin) - 1)
    # At the margin itself the two branches do not meet: leave out what rounds over it.
    if ((similarity - margin).abs() < 1e-6).any():
        return
    expected = torch.where(similarity >= margin, similarity, below).mean(-1)
    torch.testing.assert_close(energy(x, margin, alpha).double(), expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(GRIDS, st.floats(0.05, 0.5), SEEDS)
def test_pitome_by_brute_force(grid, ratio, seed):
    x = tokens(2, *grid, seed=seed)
    plan = build_method("pitome").plan(x, ratio, request(*grid, seed=seed))
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
@given(GRIDS, st.floats(0.05, 0.75), SEEDS)
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
    # Slots are numbered destinations first; those are important tokens, the same of both halves.
    assert torch.equal(*plan.representative[:, :destinations])
    for b in range(2):
        slot = plan.slot[b].tolist()
        assert set(plan.representative[b, :destinations].tolist()) <= set(important)
        # All unimportant ones merge.
        assert all(slot[t] < destinations for t in others)
        # Those that stay alone are the important ones least similar to their destinations.
        alone = [t for t in range(count) if slot[t] >= destinations]
        assert len(alone) == count - r - destinations and set(alone) <= set(important)
        best = cosines(x)[b][:, plan.representative[b, :destinations]].amax(-1)
        merged = set(important) - set(alone) - set(plan.representative[b].tolist())
        assert not alone or not merged or min(best[[*merged]]) >= max(best[alone]) - 1e-6


def test_importance_prunes_at_first_and_without_guidance_is_tome():
    x = tokens(2, 8, 8)
    late, first = request(8, 8, step=7), request(8, 8, step=1)
    method, tome = build_method("importance"), build_method("tome").plan(x, 0.5, late)
    assert torch.equal(method.plan(x, 0.5, late).slot, tome.slot)
    assert isinstance(method.plan(x, 0.5, first), PrunedPlan)
    plan = method.plan(x, 0.5, request(8, 8, guidance_map=torch.rand(1, 8, 8), step=0))
    assert isinstance(plan, PrunedPlan) and not torch.equal(*plan.slot)


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
def test_every_kth_token(grid, factor):
    x = tokens(2, *grid)
    specs = dict(type="todo", downsample_factor=factor), dict(type="downsample", factor=factor)
    todo, area = (build_method(spec).plan(x, 0.01, request(*grid)) for spec in specs)
    image = x.view(2, *grid, -1)
    up = image[:, ::factor, ::factor]
    assert torch.equal(todo.merge(x), up.flatten(1, 2))
    up = up.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, : grid[0], : grid[1]]
    assert torch.equal(todo.unmerge(todo.merge(x)), up.flatten(1, 2))
    mean = F.avg_pool2d(image.permute(0, 3, 1, 2), factor, ceil_mode=True)
    torch.testing.assert_close(area.merge(x), mean.flatten(2).transpose(1, 2))


def test_todo_leaves_coarser_levels_unmerged():
    x = tokens(1, 8, 8)
    assert build_method("todo").plan(x, 0.5, request(8, 8, level=1)) is None
    method = build_method(dict(type="todo", downsample_factor=1, downsample_factor_level_2=4))
    assert method.plan(x, 0.5, request(8, 8, level=0)) is None
    assert method.plan(x, 0.5, request(8, 8, level=2)).num_slots == 4
