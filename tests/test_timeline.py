# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import math
import pickle
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch

from mmagic_tome.timeline import Timeline, in_range


class Pipeline:
    def __init__(self, **parts):
        vars(self).update(parts)


def silent(topic, message):
    raise AssertionError(message)


def at(timeline, time, first=None, warn=silent):
    return timeline(time, time if first is None else first, warn)


# --- by the scheduler -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_the_share_of_steps_that_remain(name):
    """The same with every scheduler, whatever its timesteps are."""
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    pipeline = Pipeline(scheduler=scheduler)
    timeline = Timeline(pipeline, 1000.0)
    found = [at(timeline, float(time)) for time in scheduler.timesteps]
    assert [remaining for remaining, _ in found] == pytest.approx([(9 - i) / 10 for i in range(10)])
    assert [last for _, last in found] == [False] * 9 + [True]


def test_image_to_image_begins_lower():
    pipeline = Pipeline(scheduler=SimpleNamespace(timesteps=torch.arange(900.0, 0, -100)))
    assert at(Timeline(pipeline, 1000.0), 300.0) == (2 / 9, False)


def test_a_shift_of_the_timesteps_changes_nothing():
    shifted = SimpleNamespace(timesteps=torch.tensor([999.0, 990, 950, 800]))
    pipeline = Pipeline(scheduler=shifted)
    assert at(Timeline(pipeline, 1000.0), 950.0)[0] == 0.25


def test_timesteps_that_pipelines_divide_and_round():
    pipeline = Pipeline(scheduler=SimpleNamespace(timesteps=torch.arange(900.0, 0, -100)))
    assert at(Timeline(pipeline, 1.0), 0.3)[0] == 2 / 9
    rounded = float(torch.tensor(0.3, dtype=torch.bfloat16))
    assert rounded != 0.3 and at(Timeline(pipeline, 1.0), rounded)[0] == 2 / 9


def test_the_scheduler_is_looked_up_at_every_call():
    pipeline = Pipeline(scheduler=None)
    timeline = Timeline(pipeline, 1000.0)
    assert at(timeline, 500.0) == (0.5, None)
    pipeline.scheduler = SimpleNamespace(timesteps=torch.tensor([500.0, 100.0]))
    assert at(timeline, 500.0) == (0.5, False)
    pipeline.scheduler.timesteps = torch.tensor([900.0, 500.0])
    assert at(timeline, 500.0) == (0.0, True)
    # MMagic generates with this one.
    pipeline.test_scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 700.0, 500.0, 1.0]))
    assert at(timeline, 500.0) == (0.25, False)


def test_a_timestep_that_is_not_on_the_list_is_read_off():
    pipeline = Pipeline(scheduler=SimpleNamespace(timesteps=torch.tensor([900.0, 100.0])))
    assert at(Timeline(pipeline, 1000.0), 500.0) == (0.5, None)


def test_the_model_is_not_kept_and_its_scheduler_is():
    pipeline = Pipeline(scheduler=SimpleNamespace(timesteps=torch.tensor([900.0, 100.0])))
    timeline = Timeline(pipeline, 1000.0)
    assert at(timeline, 900.0) == (0.5, False)
    twin = copy.deepcopy(timeline)
    assert at(twin, 900.0) == (0.5, False)
    assert twin.scheduler() is not pipeline.scheduler
    alive = weakref.ref(pipeline)
    del pipeline
    assert alive() is None
    assert at(timeline, 900.0) == (0.5, False)
    # What is pickled is read elsewhere, without the pipeline.
    assert at(pickle.loads(pickle.dumps(timeline)), 900.0) == (0.9, None)


# --- by the timestep alone ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1000.0, 1.0])
def test_the_share_of_the_scale(scale):
    timeline = Timeline(None, scale)
    for share in (1.0, 0.9, 0.25, 0.0):
        assert at(timeline, share * scale, scale) == (pytest.approx(share), None)
    assert at(timeline, 1.005 * scale, scale)[0] == 1.0
    assert at(timeline, None) == (None, None)


@pytest.mark.parametrize("time", [1500.0, -5.0])
def test_what_lies_outside_of_the_scale_is_unknown(time):
    topics = []
    found = at(Timeline(None, 1000.0), time, warn=lambda topic, _: topics.append(topic))
    assert found == (None, None) and topics == ["timestep"]


def test_logarithms_of_sigma():
    """As Stable Video Diffusion is called: Karras' schedule from the run's first sigma."""
    timeline = Timeline(None, None)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = [(high + i / 8 * (low - high)) ** 7 for i in range(9)]
    times = [math.log(sigma) / 4 for sigma in sigmas]
    found = [at(timeline, time, times[0])[0] for time in times]
    assert found == pytest.approx([1 - i / 8 for i in range(9)])


def test_an_edm_sampler_around_another_network_is_told():
    topics = []
    first = math.log(80) / 4
    remaining, _ = at(Timeline(None, 1000.0), first, warn=lambda topic, _: topics.append(topic))
    assert remaining == 1.0 and topics == ["timestep"]


@pytest.mark.parametrize(
    ("remaining", "window", "expected"),
    [
        (0.5, (0.5, 0.7), True),
        (0.7, (0.5, 0.7), False),
        (0.0, (0.0, 0.7), True),
        (1.0, (0.5, 1.0), True),
        (1.0, (0.5, 0.99), False),
        (0.4, (0.5, 1.0), False),
    ],
)
def test_windows_are_half_open_and_one_includes_the_start(remaining, window, expected):
    assert in_range(remaining, window) == expected
