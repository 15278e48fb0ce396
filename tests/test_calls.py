# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching of a function."""

import pytest
import torch
from tiny import error

from mmagic_tome import ToMeError
from mmagic_tome.calls import CachedCalls

STEPS = 20
TIMES = torch.linspace(999, 49, STEPS)


def generate(calls=None, told=True, batch=2):
    """DDIM-like steps towards a mean that turns with time; the latents and how often it ran."""
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, other = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ran = []
    if calls is not None and told:
        calls.timesteps = TIMES
    for index, time in enumerate(TIMES):

        def network(x=x, time=time):
            ran.append(float(time))
            angle = time / 1000
            return (x - angle.cos() * mean - angle.sin() * other) / (0.3 + angle)

        with torch.no_grad():
            output = network() if calls is None else calls(network, x, time)
        after = TIMES[index + 1] if index + 1 < STEPS else torch.zeros(())
        x = x + output * (after - time) / 1000
    return x, ran


def test_calls_are_skipped_within_the_tolerance():
    baseline, every = generate()
    assert len(every) == STEPS
    counts = []
    for tolerance in (0.0, 0.001, 0.01, 0.1):
        calls = CachedCalls({"tolerance": tolerance})
        found, ran = generate(calls)
        assert error(found, baseline) <= 2 * tolerance
        assert len(calls.handle.predicted_error or []) in (0, 2)
        assert calls.handle.steps.count("computed") == len(ran) and ran[-1] == every[-1]
        counts.append(len(ran))
    assert counts[0] == STEPS and counts == sorted(counts, reverse=True) and counts[-1] < STEPS
    assert "step caching in Function: tolerance 0.1" in calls.handle.summary()
    assert torch.equal(generate(CachedCalls({"tolerance": 0.0}))[0], baseline)


def test_fixed_steps_and_runs_without_a_schedule():
    calls = CachedCalls({"interval": 2, "timestep_range": (0.2, 0.8)})
    _, ran = generate(calls, told=False)
    assert 1 < STEPS - len(ran) < STEPS / 2
    assert len(generate(calls, told=False)[1]) == len(ran), "every run is as the first"
    calls.handle.reset_run()
    assert len(calls.timesteps) == 0


def test_wrong_options():
    with pytest.raises(ToMeError, match="tolerance"):
        CachedCalls({"tolerance": 2})
    with pytest.raises(ToMeError, match="write region='network'"):
        CachedCalls({"tolerance": 0.1, "region": "inner"})
