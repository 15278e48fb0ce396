# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_requests import request, tokens

from mmagic_tome.merging import MatrixPlan, facility_location, make_windows
from mmagic_tome.merging.windows import window_side
from mmagic_tome.methods import build_method

CPU = torch.device("cpu")


def cosines(groups, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(groups, count, 4, generator=generator, dtype=torch.float64), dim=-1)
    return x @ x.transpose(1, 2)


def value(similarity, chosen):
    """f(D) of facility location, above that of the empty set."""
    return (similarity[:, list(chosen)].amax(1) + 1).sum().item()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_facility_location_by_brute_force(count, chosen, seed):
    chosen = min(chosen, count)
    similarity = cosines(2, count, seed)
    result = facility_location(similarity, chosen)
    for s, order in zip(similarity, result.tolist()):
        assert len(set(order)) == chosen
        # Every choice is the best next one ...
        for k in range(chosen):
            others = [j for j in range(count) if j not in order[:k]]
            best = max(value(s, [*order[:k], j]) for j in others)
            assert value(s, order[: k + 1]) >= best - 1.01e-4
        # ... and the whole within the bound of the best set there is.
        best = max(value(s, D) for D in itertools.combinations(range(count), chosen))
        assert (1 - 0.36788) * best - 1e-3 <= value(s, order) <= best + 1e-9


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 12))
def test_windows_cover_every_token_once(height, width, window):
    windows = make_windows(height, width, window, CPU)
    together = torch.cat([windows.inside.reshape(-1), windows.outside])
    assert torch.equal(together.sort().values, torch.arange(height * width))
    row, column = windows.inside // width, windows.inside % width
    # Solid rectangles of at most that side, in raster order.
    sy = (row.amax(1) - row.amin(1) + 1).unique()
    sx = (column.amax(1) - column.amin(1) + 1).unique()
    assert len(sy) == len(sx) == 1 and sy * sx == windows.size
    assert sy <= window and sx <= window
    assert torch.equal(windows.inside, windows.inside.sort(dim=1).values)
    assert (windows.count, windows.size) == windows.inside.shape


@pytest.mark.parametrize(
    ("length", "window", "side"), [(64, 8, 8), (15, 8, 5), (17, 8, 8), (23, 8, 7), (5, 8, 5)]
)
def test_window_side(length, window, side):
    assert window_side(length, window) == side


@pytest.mark.parametrize("unmerge", ["transpose", "pinv"])
@pytest.mark.parametrize("grid", [(8, 8), (9, 10)])
def test_merging_by_hand(grid, unmerge):
    x = tokens(2, *grid).double()
    method = build_method(dict(type="toma", window=4, temperature=0.2, unmerge=unmerge))
    plan = method.plan(x, 0.5, request(*grid))
    windows = make_windows(*grid, 4, CPU)
    r = int(grid[0] * grid[1] * 0.5) // windows.count
    keep = windows.size - r
    merged, back = plan.merge(x), plan.unmerge(plan.merge(x))
    for b in range(2):
        for w, inside in enumerate(windows.inside):
            part = x[b, inside]
            unit = F.normalize(part, dim=-1)
            chosen = facility_location((unit @ unit.T)[None].float(), keep)[0]
            share = torch.exp(unit[chosen] @ unit.T / 0.2)
            share = share / share.sum(0)
            weights = share / share.sum(1, keepdim=True)
            expected = weights @ part
            torch.testing.assert_close(
                merged[b, w * keep : (w + 1) * keep], expected, rtol=1e-4, atol=1e-4
            )
            undo = share.T if unmerge == "transpose" else torch.linalg.pinv(weights)
            torch.testing.assert_close(back[b, inside], undo @ expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(back[b, windows.outside], x[b, windows.outside])
        assert torch.equal(merged[b, windows.count * keep :], x[b, windows.outside])


def test_pinv_restores_what_was_unmerged():
    x = tokens(1, 8, 8)
    plan = build_method(dict(type="toma", unmerge="pinv")).plan(x, 0.5, request(8, 8))
    y = torch.randn(1, plan.num_slots, 3)
    torch.testing.assert_close(plan.merge(plan.unmerge(y)), y, rtol=1e-3, atol=1e-3)


def test_cold_is_hard_merging():
    """Towards temperature 0 every token goes to its most similar destination alone."""
    x = tokens(1, 8, 8)
    plan = build_method(dict(type="toma", temperature=1e-4)).plan(x, 0.5, request(8, 8))
    hard = torch.zeros(1, plan.num_slots, 64).scatter(1, plan.slot[:, None], 1)
    hard = hard / hard.sum(-1, keepdim=True)
    torch.testing.assert_close(plan.merge(x), hard @ x, rtol=1e-4, atol=1e-4)


def test_fewer_than_one_token_per_window_is_nothing():
    x = tokens(1, 16, 16)
    assert build_method("toma").plan(x, 3 / 256, request(16, 16)) is None
    assert build_method("toma").plan(x, 4 / 256, request(16, 16)).num_slots == 252


def test_matrices_that_do_not_fit_are_named():
    windows = make_windows(4, 4, 2, CPU)
    with pytest.raises(ValueError, match="4 windows of 4 tokens"):
        MatrixPlan(torch.zeros(4, 2, 5), torch.zeros(4, 5, 2), windows)
