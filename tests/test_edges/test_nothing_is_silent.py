# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where nothing can be skipped or merged, a warning says so once."""

import warnings

import pytest
import torch
from edge_pipelines import generate, sd15_pipeline, skips
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_cache, apply_tome


def warned(caught, words):
    return sum(words in str(one.message) for one in caught)


def test_gradients():
    network = tiny_unet()
    handle = apply_cache(network, "fast")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for time in (951, 901, 851, 801):
            network(**{**tiny_inputs(), "timestep": torch.tensor(time)})
    assert warned(caught, "gradients") == 1
    assert skips(handle)["network"] == 0


def test_few_steps():
    case, pipeline = sd15_pipeline()
    handle = apply_cache(pipeline, "balanced")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            generate(case, pipeline, num_inference_steps=3)
    assert warned(caught, "skipped nothing in a run of 3 steps") == 1
    assert sum(skips(handle).values()) == 0


def test_one_step():
    case, pipeline = sd15_pipeline()
    apply_cache(pipeline, "fast")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            generate(case, pipeline, num_inference_steps=1)
    assert warned(caught, "skipped nothing in a run of 1 step") == 1


def test_no_timestep():
    network = tiny_unet()
    handle = apply_cache(network, "fast")
    handle._parts[0].patch.adapter = type(
        "NoTimestep", (type(handle._parts[0].patch.adapter),), {"timestep": lambda *_: None}
    )()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(3):
            network(**tiny_inputs())
    assert warned(caught, "skips nothing") == 1
    assert skips(handle)["network"] == 0


def test_skipping_says_nothing():
    case, pipeline = sd15_pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_cache(pipeline, "balanced")
        for _ in range(2):
            generate(case, pipeline)


def test_importance_without_guidance():
    network = tiny_unet()
    apply_tome(network, ratio=0.5, method="importance")
    inputs = tiny_inputs()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for time in (951, 901):
            network(**{**inputs, "timestep": torch.tensor(time)})
    assert warned(caught, "importance") == 1


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "IPNDMScheduler"])
def test_a_scheduler_that_amplifies_oscillation(scheduler):
    import diffusers

    _, pipeline = sd15_pipeline()
    pipeline.scheduler = getattr(diffusers, scheduler)()
    with pytest.warns(UserWarning, match="amplifies step-to-step oscillation"):
        apply_cache(pipeline, "balanced")


def test_images_at_different_timesteps():
    """As a server that fills its batch with whatever waits; the first must not speak for all."""
    network = tiny_unet()
    handle = apply_cache(network, region="network", timestep_range=(0, 1))
    inputs = tiny_inputs()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for time in range(951, 0, -100):
            both = torch.tensor([time, max(time - 600, 1)])
            output = network(**{**inputs, "timestep": both}).sample
            inputs["sample"] = inputs["sample"] - 0.05 * output
    assert warned(caught, "different timesteps") == 1
    assert len(caught) == 1
    assert skips(handle)["network"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserWarning])
def test_skipping_goes_on_after_an_error_in_front_of_the_network(error):
    network = tiny_unet()
    handle = apply_cache(network, "fast")
    time = torch.tensor(5000.0)  # warns

    class Interrupted(torch.Tensor):
        def tolist(self):
            raise KeyboardInterrupt

    if error is KeyboardInterrupt:
        time = time.as_subclass(Interrupted)
    with warnings.catch_warnings(), torch.no_grad(), pytest.raises(error):
        warnings.simplefilter("error")
        network(**{**tiny_inputs(), "timestep": time})
    inputs = tiny_inputs()
    with torch.no_grad():
        for time in range(951, 0, -50):
            output = network(**{**inputs, "timestep": torch.tensor(time)}).sample
            inputs["sample"] = inputs["sample"] - 0.05 * output
    assert skips(handle) == {"network": 9, "inner": 3}


def test_timesteps_that_rise():
    """As in DDIM inversion: every call begins a run."""
    network = tiny_unet()
    handle = apply_cache(network, "fast")
    inputs = tiny_inputs()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for time in range(1, 1000, 50):
            output = network(**{**inputs, "timestep": torch.tensor(time)}).sample
            inputs["sample"] = inputs["sample"] + 0.05 * output
    assert warned(caught, "did not follow from the one before") == 1
    assert skips(handle)["network"] == 0
