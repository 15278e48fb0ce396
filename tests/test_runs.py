# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which calls of a network are steps of one denoising run."""

import diffusers
import pytest
import torch

from mmagic_tome.latents import conditioning_of, latents_of, read_timestep, tensors_of
from mmagic_tome.runs import MAX_RESIDUAL, Call, RunTracker

TIMES = (900, 700, 500, 300, 100)


class State:
    """What a technique keeps."""


def image(seed=0, batch=1, channels=4, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=generator)


_MIX = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) / 8


def network(x, text=0.0):
    """Some prediction for every image: not smooth, and other than its input."""
    x = x[:, :4].flatten(2)
    mix = _MIX[: x.shape[2], : x.shape[2]].to(x)
    return torch.tanh(x @ mix + text).unflatten(2, (int(x.shape[2] ** 0.5), -1))


def call(tracker, x, time, text=0.0, **known):
    """One call; the run it belongs to, and the output."""
    run = tracker.begin(Call(time, (x,), **known))
    output = network(x, text)
    tracker.end(output)
    return run, output


def denoise(tracker, x, times=TIMES):
    """The latents of a run, and the one after it; checks that it is one run."""
    latents = [x]
    for step, time in enumerate(times):
        run, output = call(tracker, latents[-1], time)
        assert run.step == step
        latents.append(1.02 * latents[-1] - 0.1 * output)
    return latents


@pytest.fixture
def tracker():
    return RunTracker(State)


SAMPLERS = (
    *("DDIM", "PNDM", "EulerDiscrete", "LMSDiscrete", "DPMSolverMultistep", "UniPCMultistep"),
    *("DEISMultistep", "HeunDiscrete", "EulerAncestralDiscrete", "FlowMatchEulerDiscrete"),
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_steps_of_a_sampler_are_one_run(tracker, name):
    options = dict(skip_prk_steps=True) if name == "PNDM" else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    noisy = dict(generator=torch.Generator().manual_seed(1)) if "Ancestral" in name else {}
    for seed in range(2):  # the second image is another run
        scheduler.set_timesteps(12)
        sample = image(seed) * getattr(scheduler, "init_noise_sigma", 1.0)
        runs, steps = set(), []
        for time in scheduler.timesteps:
            scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
            run, output = call(tracker, scale(sample, time), float(time))
            runs.add(run)
            steps.append(run.step)
            sample = scheduler.step(output, time, sample, **noisy).prev_sample
        assert len(runs) == 1 and steps == list(range(len(steps)))
        assert run.first_time == float(scheduler.timesteps[0])


@pytest.mark.parametrize(
    ("x", "time"),
    [
        # Another image, at any timestep.
        *((image(1), time) for time in (700, 899, 100)),
        (torch.cat([image(batch=2)[:1], image(7)]), 700),  # one of a batch
        # Another shape or type.
        (image(size=4), 700),
        (image(batch=3), 700),
        (image().double(), 700),
        (image(channels=8), 700),
        (image() * float("nan"), 700),
        (image(), 901),  # a timestep never rises
        (image(), None),
    ],
)
def test_what_begins_another_run(tracker, x, time):
    first, _ = call(tracker, image(batch=2) if len(x) == 2 else image(), 900)
    run, _ = call(tracker, x, time)
    assert run is not first and run.step == 0 and run.first_time == time


def test_a_run_that_fits_well_is_held_to_it(tracker):
    """What an ancestral sampler may do at its first step is another image for DDIM at its third."""
    for exact_steps in (0, 2):
        tracker.clear()
        *_, x = denoise(tracker, image(), (900, 800, 700)[: exact_steps + 1])
        run = tracker.runs[0]
        noisy = 0.8 * x + 0.25 * image(3)
        assert 0.1 < run.fit((noisy,)).residual < MAX_RESIDUAL
        assert (call(tracker, noisy, 600)[0] is run) == (exact_steps == 0)


def test_nothing_goes_on_where_nothing_is_known(tracker):
    for unknown in (dict(time=None), dict(latents=())):
        for time in (900, 700, 500):
            run = tracker.begin(Call(**{"time": time, "latents": (image(),), **unknown}))
            tracker.end(network(image()))
            assert run.step == 0 and tracker.runs == [run]


def test_channels_that_are_not_predicted_do_not_count(tracker):
    """The mask and the masked image of inpainting; without them it would be the same image."""
    x, given = image(0), image(9, channels=5) * 10
    first, output = call(tracker, torch.cat([x, given], 1), 900)
    x = 1.02 * x - 0.1 * output
    assert call(tracker, torch.cat([x, given], 1), 700)[0] is first
    assert call(tracker, torch.cat([image(1), given], 1), 600)[0] is not first


def test_a_controlnet_goes_on_by_its_inputs_or_by_its_leader(tracker):
    follower = RunTracker(State)
    for leader in (None, tracker):
        follower.leader = leader
        x = image()
        for step, time in enumerate(TIMES):
            run = follower.begin(Call(time, (x,)))
            assert run.step == step
            follower.end(([image(size=2), image(size=4)], image(size=1)))
            # At small steps the input alone fits too; at large ones it needs the outputs.
            _, output = call(tracker, x, time)
            x = 1.02 * x - (1.0 if leader else 0.1) * output
        follower.begin(Call(50, (image(1),)))
        assert follower.runs[0] is not run
        follower.clear(), tracker.clear()


def test_branches_by_name_in_any_order(tracker):
    x, states = image(), {}
    for step, time in enumerate(TIMES):
        outputs = {}
        for text in (0.5, -0.5) if step % 2 else (-0.5, 0.5):
            tracker.branch_name = f"{text}"
            run, outputs[text] = call(tracker, x, time, text)
            assert run.step == step
            assert states.setdefault(text, run.branch.state) is run.branch.state
        x = 1.02 * x - 0.1 * (3 * outputs[0.5] - 2 * outputs[-0.5])
    assert states[0.5] is not states[-0.5]


def test_runs_that_stopped_are_let_go(tracker):
    for seed in range(100):
        call(tracker, image(seed), 900)
    assert len(tracker.runs) == 64
    for seed in range(100):
        call(tracker, image(seed), 900 - seed)
    assert len(tracker.runs) <= 4


def test_a_run_that_goes_on_ends_those_that_did_not(tracker):
    x = image(0)
    run, output = call(tracker, x, 900)
    for seed in (1, 2):
        call(tracker, image(seed), 900)
    for time, runs in ((800, 3), (700, 1)):
        x = 1.02 * x - 0.1 * output
        again, output = call(tracker, x, time)
        # At the second step the others may still come.
        assert again is run and len(tracker.runs) == runs


def test_the_last_step_by_the_stride(tracker):
    for times, last in (
        (TIMES, 4),
        (range(981, 0, -20), 49),  # DDIM's
        (range(999, 0, -125), 7),
        ((999, 660, 330), 2),
    ):
        tracker.clear()
        runs = (call(tracker, image(), time, remaining=time / 1000)[0] for time in times)
        assert [run.last for run in runs].index(True) == last


def test_the_first_timestep_of_the_run_that_seems_to_go_on(tracker):
    assert tracker.first_time(900) == 900
    call(tracker, image(), 900)
    call(tracker, image(), 800)
    assert tracker.first_time(700) == tracker.first_time(800) == 900
    assert tracker.first_time(950) == 950 and tracker.first_time(None) is None


def test_what_calls_contain():
    x, text = image(), torch.zeros(1, 7, 16)
    assert latents_of((x, 7), dict(encoder_hidden_states=text)) == (x,)
    for name in ("sample", "hidden_states", "x"):
        assert latents_of((), {"encoder_hidden_states": text, name: x})[0] is x
    assert latents_of((), dict(timestep=7, noisy=x))[0] is x
    assert len(latents_of(([x, x], 7), {})) == 2 and latents_of((7, x), {}) == latents_of((), {})
    assert conditioning_of((x,), dict(encoder_hidden_states=text)) is text
    assert conditioning_of((x, torch.tensor([7]), text), {}) is text
    for output in (x, (x,), (x, None), dict(sample=x), ((x, 3),)):
        assert tensors_of(output)[0] is x and len(tensors_of(output)) == 1
    assert len(tensors_of(([x, x],))) == 2 and tensors_of(None) == tensors_of(()) == []
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7, 7])):
        assert read_timestep(timestep) == (7.0, True)
    assert read_timestep(torch.tensor([7, 5])) == (7.0, False)
    assert read_timestep(None) == (None, True)
