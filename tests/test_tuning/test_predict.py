# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Predictions against what a network really does, call by call."""

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_tome
from mmagic_tome.tuning.predict import Costs, Predictor, left_out
from mmagic_tome.tuning.space import Candidate, Merge, Part, Window

TIMES = [951.0 - 50 * i for i in range(20)]
LEVELS = [time / 1000 for time in TIMES]
BOTH = Candidate(Window(2, 0.1, 0.8), Window(3, 0.0, 0.9))


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(Window(2, 0.1, 0.8)),
        Candidate(Window(4, 0.0, 1.0)),
        Candidate(deep=Window(3, 0.0, 0.9)),
        Candidate(deep=Window(3, 0.0, 0.9), order=0),
        Candidate(Window(2, 0.1, 0.8, 0.5), Window(2, 0.0, 0.9, 0.5)),
        BOTH,
    ],
)
def test_what_is_left_out_is_what_a_network_leaves_out(candidate):
    unet = tiny_unet()
    inputs = tiny_inputs(batch=1, size=8)
    found = []
    with apply_tome(unet, candidate.config()) as handle, torch.no_grad():
        before = {row["scope"]: 0 for row in handle.scopes()}
        for time in TIMES:
            unet(**{**inputs, "timestep": torch.tensor(time)})
            now = {row["scope"]: row["reused"] for row in handle.scopes()}
            found.append({scope for scope in now if now[scope] > before[scope]})
            before = now
    assert left_out(candidate.config(), TIMES, LEVELS) == found
    assert any(found)


def test_a_run_is_the_sum_of_its_calls():
    costs = Costs(0.01, 0.4, 2.0, {("attn", 1, 0.5): -0.1, ("attn", 2, 0.5): -0.2}, {2})
    predictor = Predictor(costs, TIMES, LEVELS)
    out = left_out(BOTH.config(), TIMES, LEVELS)
    network = sum("network" in one for one in out)
    deep = sum("deep" in one for one in out)
    full = 20 - network - deep
    assert network > 3 and deep > 2
    assert predictor.time(BOTH) == pytest.approx(2 + full + 0.4 * deep + 0.01 * network)
    assert predictor.speedup(Candidate()) == 1
    assert predictor.fewer_steps(0.5) == pytest.approx(22 / 12)

    # Merging acts at its noise levels only, and not at levels that are left out.
    merge = Merge("attn", (Part(1, 0.5, 0.5, 1.0), Part(2, 0.5, 0.5, 1.0)))
    high = [level >= 0.5 for level in LEVELS]
    assert predictor.time(Candidate(merge=merge)) == pytest.approx(22 - 0.3 * sum(high))
    both = Candidate(deep=BOTH.deep, merge=merge)
    out = left_out(both.config(), TIMES, LEVELS)
    calls = [(0.4 - 0.1 * h) if "deep" in one else (1 - 0.3 * h) for one, h in zip(out, high)]
    assert predictor.time(both) == pytest.approx(2 + sum(calls))
    # Each level at its own.
    apart = merge.with_part(Part(2, 0.5, 0.0, 0.5))
    low = [level <= 0.5 for level in LEVELS]
    saved = 0.1 * sum(high) + 0.2 * sum(low)
    assert predictor.time(Candidate(merge=apart)) == pytest.approx(22 - saved)
