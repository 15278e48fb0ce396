# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Predictions against what a network really does, call by call."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_cache
from mmagic_tome.cache.skip import skips_of_run
from mmagic_tome.tuning.predict import Costs, Predictor
from mmagic_tome.tuning.space import Candidate, Merge, Part, Window

COUNT = 20
TIMES = [951.0 - 50 * i for i in range(COUNT)]
REMAINING = [(COUNT - 1 - i) / COUNT for i in range(COUNT)]
BOTH = Candidate(Window(2, 0.1, 0.8), Window(3, 0.0, 0.9))


class Pipeline:
    """A scheduler beside the network."""

    def __init__(self, unet):
        self.unet, self.scheduler = unet, SimpleNamespace(timesteps=torch.tensor(TIMES))


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(Window(2, 0.1, 0.8)),
        Candidate(Window(4, 0.0, 1.0)),
        Candidate(inner=Window(3, 0.0, 0.9)),
        Candidate(inner=Window(3, 0.0, 0.9), order=0),
        Candidate(Window(2, 0.1, 0.8, 0.5), Window(2, 0.0, 0.9, 0.5)),
        BOTH,
    ],
)
def test_predicted_skips_are_those_of_a_network(candidate):
    pipeline = Pipeline(tiny_unet())
    inputs = tiny_inputs(batch=1, size=8)
    found = []
    with apply_cache(pipeline, list(candidate.caches)) as handle, torch.no_grad():
        before = {row["region"]: 0 for row in handle.stats()}
        for time in TIMES:
            pipeline.unet(**{**inputs, "timestep": torch.tensor(time)})
            now = {row["region"]: row["skipped"] for row in handle.stats()}
            found.append({region for region in now if now[region] > before[region]})
            before = now
    assert skips_of_run(candidate.caches, COUNT) == found
    assert any(found)


def test_a_run_is_the_sum_of_its_calls():
    costs = Costs(0.01, 0.4, 2.0, {("attn", 1, 0.5): -0.1, ("attn", 2, 0.5): -0.2}, {2})
    predictor = Predictor(costs, COUNT)
    skips = skips_of_run(BOTH.caches, COUNT)
    network = sum("network" in one for one in skips)
    inner = sum("inner" in one for one in skips)
    full = 20 - network - inner
    assert network > 3 and inner > 2
    assert predictor.time(BOTH) == pytest.approx(2 + full + 0.4 * inner + 0.01 * network)
    assert predictor.speedup(Candidate()) == 1
    assert predictor.fewer_steps(0.5) == pytest.approx(22 / 12)

    # Merging acts in its window only, and not at levels that are skipped.
    merge = Merge("attn", (Part(1, 0.5, 0.5, 1.0), Part(2, 0.5, 0.5, 1.0)))
    high = [remaining >= 0.5 for remaining in REMAINING]
    assert predictor.time(Candidate(merge=merge)) == pytest.approx(22 - 0.3 * sum(high))
    both = Candidate(inner=BOTH.inner, merge=merge)
    skips = skips_of_run(both.caches, COUNT)
    calls = [(0.4 - 0.1 * h) if "inner" in one else (1 - 0.3 * h) for one, h in zip(skips, high)]
    assert predictor.time(both) == pytest.approx(2 + sum(calls))
    # Each level in its own; a window is half-open.
    apart = merge.with_part(Part(2, 0.5, 0.0, 0.5))
    low = [remaining < 0.5 for remaining in REMAINING]
    saved = 0.1 * sum(high) + 0.2 * sum(low)
    assert predictor.time(Candidate(merge=apart)) == pytest.approx(22 - saved)
