# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where nothing can be skipped, a warning says so once; otherwise nothing is said."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from denoise import denoise
from edge_pipelines import SKIPS, TIMES, generate, sd15_pipeline, skips
from fixed_steps import FIXED
from tiny import tiny_inputs, tiny_unet
from warned import silent, warns_once

from mmagic_tome import apply_cache
from mmagic_tome.cache.skip import CachePatch
from mmagic_tome.patch import find_patch


def denoise_at(network, times):
    """Denoise at timesteps of any form."""
    denoise(network, lambda time: {**tiny_inputs(), "timestep": time}, times)


def with_gradients(network):
    for _ in TIMES:
        network(**tiny_inputs()).sample.sum().backward()
    assert network.conv_in.weight.grad is not None


def different_timesteps(network):
    """As a server that fills its batch with whatever waits; the first must not speak for all."""
    denoise_at(network, [torch.tensor([time, max(time - 600, 1)]) for time in TIMES])


def unknown_timesteps(network):
    patch = find_patch(network, CachePatch)
    adapter, patch.adapter = patch.adapter, SimpleNamespace(timestep=lambda *_: None)
    denoise(network, tiny_inputs(), TIMES)
    patch.adapter = adapter


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (with_gradients, "nothing while gradients are enabled"),
        (different_timesteps, "different timesteps"),
        (unknown_timesteps, "not known how much of the run remains"),
        (lambda network: denoise_at(network, [5000.0] * 3), "were expected"),
        # As in DDIM inversion: every call begins a run.
        (lambda network: denoise_at(network, TIMES[::-1]), "did not follow from the one before"),
    ],
)
def test_what_cannot_be_skipped_is_said_once(call, words):
    network = tiny_unet()
    handle = apply_cache(network, FIXED["most"])
    with warns_once(words):
        for _ in range(2):
            call(network)
    assert set(skips(handle).values()) == {0}
    # And whatever can be skipped afterwards is.
    denoise(network, tiny_inputs(seed=1), TIMES)
    assert skips(handle) == SKIPS["most"]


def test_too_few_steps():
    case, pipeline = sd15_pipeline()
    handle = apply_cache(pipeline, FIXED["both"])
    with warns_once("skipped nothing in a run of 3 steps"):
        for _ in range(2):
            generate(case, pipeline, num_inference_steps=3)
    assert set(skips(handle).values()) == {0}
    apply_cache(pipeline, FIXED["both"])
    with silent():
        generate(case, pipeline)


@pytest.mark.parametrize("error", [UserWarning, ZeroDivisionError])
def test_skipping_goes_on_after_an_error(error):
    """In front of the network, or inside of it."""
    network = tiny_unet()
    handle = apply_cache(network, FIXED["most"])
    expected = denoise(network, tiny_inputs(), TIMES)
    times, hook = [951, 901], contextlib.nullcontext()
    if error is ZeroDivisionError:
        hook = network.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
    else:
        times.append(torch.tensor(5000.0))  # warns
    with warnings.catch_warnings(), pytest.raises(error), hook:
        warnings.simplefilter("error")
        denoise_at(network, times)
    handle.reset_stats()
    assert torch.equal(denoise(network, tiny_inputs(), TIMES), expected)
    assert skips(handle) == SKIPS["most"]
