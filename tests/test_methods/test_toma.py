# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_requests import cosines, request, tokens

from mmagic_tome.merging import make_windows
from mmagic_tome.methods import build_method
from mmagic_tome.methods.toma import facility_location


def value(similarity, chosen):
    """f(D) of facility location, above that of the empty set."""
    return (similarity[:, list(chosen)].amax(1) + 1).sum().item()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_facility_location_by_brute_force(count, chosen, seed):
    chosen = min(chosen, count)
    generator = torch.Generator().manual_seed(seed)
    similarity = cosines(torch.randn(2, count, 4, generator=generator))
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


@pytest.mark.parametrize("unmerge", ["transpose", "pinv"])
@pytest.mark.parametrize("grid", [(8, 8), (9, 10)])
def test_merging_by_hand(grid, unmerge):
    x = tokens(2, *grid).double()
    method = build_method(dict(type="toma", window=4, temperature=0.2, unmerge=unmerge))
    plan = method.plan(x, 0.5, request(*grid))
    windows = make_windows(*grid, 4, torch.device("cpu"))
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
            expected, found = weights @ part, merged[b, w * keep : (w + 1) * keep]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            undo = share.T if unmerge == "transpose" else torch.linalg.pinv(weights)
            torch.testing.assert_close(back[b, inside], undo @ expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(back[b, windows.outside], x[b, windows.outside])
        assert torch.equal(merged[b, windows.count * keep :], x[b, windows.outside])
    if unmerge == "pinv":  # which restores what was unmerged
        torch.testing.assert_close(plan.merge(back), merged, rtol=1e-3, atol=1e-3)
