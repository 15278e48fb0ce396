# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import math
import pickle
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch
from fixed_steps import FIXED
from tiny import tiny_unet
from warned import silent

from mmagic_tome import apply_cache
from mmagic_tome.timeline import Timeline


class Pipeline:
    def __init__(self, timesteps=None):
        self.scheduler = scheduler(timesteps)


def scheduler(timesteps):
    return None if timesteps is None else SimpleNamespace(timesteps=torch.tensor(timesteps))


def at(timeline, time, first=None, topics=None):
    """What remains, and whether it is the last step; ``topics``: those that are warned of."""

    def warn(topic, message):
        assert topics is not None, message
        topics.append(topic)

    return timeline(time, time if first is None else first, warn)


# --- by the scheduler -----------------------------------------------------------------------------


def test_the_last_of_two_evaluations_at_a_timestep_is_the_last_step():
    """Heun's list names every timestep but the first twice."""
    pipeline = Pipeline()
    pipeline.scheduler = diffusers.HeunDiscreteScheduler()
    pipeline.scheduler.set_timesteps(20)
    timeline = Timeline(pipeline, 1000.0)
    first, *_, last = pipeline.scheduler.timesteps.tolist()
    assert at(timeline, last, first) == (0.0, True)
    assert at(timeline, first)[1] is False


@pytest.mark.parametrize(
    ("timesteps", "scale", "time", "expected"),
    [
        ([900.0, 600.0, 300.0], 1000, 300.0, (0, True)),
        ([999.0, 990.0, 950.0, 800.0], 1000, 950.0, (0.25, False)),  # shifted
        # Pipelines that divide, and round to half precision.
        ([900.0, 600.0, 300.0, 10.0], 1, float(torch.tensor(0.3).bfloat16()), (0.25, False)),
        ([1000.0, 1.0], 1, 1.0, (0.5, False)),
        ([1000.0, 1.0], 1000, 1.0, (0, True)),
        ([1.6, 0.4, -1.5], None, 0.4, (1 / 3, False)),  # ln(sigma) / 4
        # Not on the list: read off.
        ([900.0, 100.0], 1000, 500.0, (0.5, None)),
    ],
)
def test_places_on_the_list(timesteps, scale, time, expected):
    assert at(Timeline(Pipeline(timesteps), scale and float(scale)), time) == expected


def test_the_scheduler_is_looked_up_at_every_call_and_the_model_is_not_kept():
    pipeline = Pipeline()
    timeline = Timeline(pipeline, 1000.0)
    assert at(timeline, 500.0) == (0.5, None)
    pipeline.scheduler = scheduler([500.0, 100.0])
    assert at(timeline, 500.0) == (0.5, False)
    pipeline.scheduler.timesteps = torch.tensor([900.0, 500.0])
    assert at(timeline, 500.0) == (0.0, True)
    # MMagic generates with this one.
    pipeline.test_scheduler = scheduler([900.0, 700.0, 500.0, 1.0])
    assert at(timeline, 500.0) == (0.25, False)
    copied, twin = copy.deepcopy([pipeline, timeline])
    assert at(twin, 500.0) == (0.25, False)
    assert twin.scheduler() is copied.test_scheduler is not pipeline.test_scheduler
    alive = weakref.ref(pipeline)
    del pipeline
    assert alive() is None
    assert at(timeline, 500.0) == (0.25, False)
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
    for outside in (1.5 * scale, -0.005 * scale):
        assert at(timeline, outside, topics=(topics := [])) == (None, None)
        assert topics == ["timestep"]


def test_logarithms_of_sigma():
    """As Stable Video Diffusion is called: Karras' schedule from the run's first sigma."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = [(high + i / 8 * (low - high)) ** 7 for i in range(9)]
    times = [math.log(sigma) / 4 for sigma in sigmas]
    found = [at(Timeline(None, None), time, times[0])[0] for time in times]
    assert found == pytest.approx([1 - i / 8 for i in range(9)])


# --- schedulers that amplify oscillation ----------------------------------------------------------


def test_schedulers_of_four_outputs_are_warned_of():
    """MMagic generates with its test_scheduler; the other one is for training."""
    unet, pndm = tiny_unet(), diffusers.PNDMScheduler()
    for name in ("PNDMScheduler", "IPNDMScheduler", "LMSDiscreteScheduler"):
        with pytest.warns(UserWarning, match=f"^{name} amplifies.*or set error_feedback=0"):
            scheduler = getattr(diffusers, name)()
            apply_cache(SimpleNamespace(unet=unet, scheduler=scheduler), FIXED["both"])
    with silent():
        apply_cache(unet, FIXED["both"])
        apply_cache(SimpleNamespace(unet=unet, scheduler=pndm), region="network")
        ddim = diffusers.DDIMScheduler()
        apply_cache(SimpleNamespace(unet=unet, scheduler=pndm, test_scheduler=ddim), FIXED["both"])
    with pytest.warns(UserWarning, match="PNDMScheduler amplifies"):
        apply_cache(SimpleNamespace(unet=unet, scheduler=ddim, test_scheduler=pndm), FIXED["both"])


@pytest.mark.parametrize(
    ("name", "options", "alternating"),
    [
        ("DDIM", {}, False),
        ("UniPCMultistep", {}, False),
        ("UniPCMultistep", dict(solver_order=3), True),
        ("DEISMultistep", {}, True),
        ("PNDM", {}, True),
        ("LMSDiscrete", {}, True),
    ],
)
def test_which_schedulers_amplify(name, options, alternating):
    pipeline = Pipeline()
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    timeline = Timeline(pipeline, 1000.0)
    factor, found = timeline.amplification
    assert found == alternating and (factor >= 3 if alternating else factor <= 1.5)
    # A pickle no longer has the scheduler, and still knows; so does a copy of the pickle.
    other = pickle.loads(pickle.dumps(timeline))
    assert other.amplification == copy.deepcopy(other).amplification == (factor, found)
