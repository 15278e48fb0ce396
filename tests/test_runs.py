# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which calls of a network are steps of one denoising run."""

import diffusers
import pytest
import torch

from mmagic_tome.latents import latents_of, read_timestep, tensors_of
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


@pytest.fixture
def tracker():
    return RunTracker(State)


# --- one image ------------------------------------------------------------------------------------

SCHEDULERS = {
    "DDIMScheduler": {},
    "PNDMScheduler": dict(skip_prk_steps=True),
    "EulerDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "HeunDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_steps_of_a_sampler_are_one_run(tracker, name):
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    generator = torch.Generator().manual_seed(1)
    noisy = dict(generator=generator) if "Ancestral" in name else {}
    for seed in range(2):
        scheduler.set_timesteps(12)
        sample = image(seed) * getattr(scheduler, "init_noise_sigma", 1.0)
        runs, steps = [], []
        for time in scheduler.timesteps:
            scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
            run, output = call(tracker, scale(sample, time), float(time))
            runs.append(run)
            steps.append(run.step)
            sample = scheduler.step(output, time, sample, **noisy).prev_sample
        assert {id(run) for run in runs} == {id(runs[0])}, "the second image is another run"
        assert steps == list(range(len(steps)))
        assert run.first_time == float(scheduler.timesteps[0])


def test_an_input_that_does_not_change_goes_on(tracker):
    runs = [call(tracker, image(), time)[0] for time in TIMES]
    assert {id(run) for run in runs} == {id(runs[0])} and runs[0].step == 4


@pytest.mark.parametrize("time", [700, 899, 100])
def test_another_image_is_another_run_at_any_timestep(tracker, time):
    first, _ = call(tracker, image(0), 900)
    second, _ = call(tracker, image(1), time)
    assert second is not first and second.step == 0 and second.first_time == time


def test_one_other_image_in_a_batch_is_another_run(tracker):
    x = image(batch=3)
    first, output = call(tracker, x, 900)
    x = 1.02 * x - 0.1 * output
    x[1] = image(7)[0]
    assert call(tracker, x, 700)[0] is not first


def test_a_run_that_fits_well_is_held_to_it(tracker):
    """What an ancestral sampler may do at its first step is another image for DDIM at its third."""
    for exact_steps in (0, 2):
        tracker.clear()
        x = image()
        for time in (900, 800, 700)[: exact_steps + 1]:
            run, output = call(tracker, x, time)
            x = 1.02 * x - 0.1 * output
        noisy = 0.8 * x + 0.25 * image(3)
        assert 0.1 < run.fit((noisy,))[0] < MAX_RESIDUAL
        assert (call(tracker, noisy, 600)[0] is run) == (exact_steps == 0)


@pytest.mark.parametrize(
    "changed",
    [
        image(size=4),
        image(batch=2),
        image().double(),
        image(channels=8),
    ],
)
def test_another_shape_or_type_is_another_run(tracker, changed):
    first, _ = call(tracker, image(), 900)
    assert call(tracker, changed, 700)[0] is not first


def test_a_timestep_never_rises_within_a_run(tracker):
    first, _ = call(tracker, image(), 700)
    assert call(tracker, image(), 900)[0] is not first


def test_what_is_not_finite_is_another_run(tracker):
    first, _ = call(tracker, image(), 900)
    assert call(tracker, image() * float("nan"), 700)[0] is not first


@pytest.mark.parametrize("unknown", [dict(time=None), dict(latents=())])
def test_nothing_goes_on_where_nothing_is_known(tracker, unknown):
    runs = []
    for time in (900, 700):
        runs.append(tracker.begin(Call(**{"time": time, "latents": (image(),), **unknown})))
        tracker.end(network(image()))
    assert runs[0] is not runs[1] and runs[1].step == 0


def test_channels_that_are_not_predicted_do_not_count(tracker):
    """The mask and the masked image of inpainting; without them it would be the same image."""
    x, given = image(0), image(9, channels=5) * 10
    first, output = call(tracker, torch.cat([x, given], 1), 900)
    x = 1.02 * x - 0.1 * output
    assert call(tracker, torch.cat([x, given], 1), 700)[0] is first
    assert call(tracker, torch.cat([image(1), given], 1), 600)[0] is not first


def test_lists_of_images_go_on(tracker):
    """Z-Image takes and returns a list."""
    xs = [image(i)[0] for i in range(2)]
    for step, time in enumerate((900, 800, 700)):
        run = tracker.begin(Call(time, tuple(xs)))
        assert run.step == step
        outputs = [network(x[None])[0] for x in xs]
        tracker.end((outputs,))
        xs = [1.02 * x - 0.1 * y for x, y in zip(xs, outputs)]


def test_a_controlnet_goes_on_by_its_inputs_alone(tracker):
    x = image()
    for step, time in enumerate((900, 800, 700)):
        run = tracker.begin(Call(time, (x,)))
        assert run.step == step
        tracker.end(((image(size=2), image(size=4)), image(size=1)))
        x = 1.02 * x - 0.1 * network(x)
    assert call(tracker, image(1), 600)[0] is not run


# --- guidance -------------------------------------------------------------------------------------


def test_two_calls_per_step_are_two_branches(tracker):
    for seed in range(2):
        x, states = image(seed), {}
        for step, time in enumerate(TIMES):
            outputs = []
            for branch, text in enumerate((0.5, -0.5)):
                run, output = call(tracker, x, time, text)
                assert run.step == step and run.called[-1] == branch
                assert states.setdefault(branch, run.branch.state) is run.branch.state
                outputs.append(output)
            x = 1.02 * x - 0.1 * (3 * outputs[0] - 2 * outputs[1])
        assert states[0] is not states[1]


def test_branches_by_name_in_any_order(tracker):
    x, states = image(), {}
    for step, time in enumerate(TIMES):
        outputs = {}
        for name in ("cond", "uncond") if step % 2 else ("uncond", "cond"):
            tracker.branch_name = name
            run, outputs[name] = call(tracker, x, time, dict(cond=0.5, uncond=-0.5)[name])
            assert run.step == step
            assert states.setdefault(name, run.branch.state) is run.branch.state
        x = 1.02 * x - 0.1 * (3 * outputs["cond"] - 2 * outputs["uncond"])
    assert states["cond"] is not states["uncond"]


def test_both_halves_of_guidance_in_one_batch(tracker):
    x = image()
    for step, time in enumerate(TIMES):
        run = tracker.begin(Call(time, (torch.cat([x, x]),)))
        assert run.step == step
        outputs = torch.cat([network(x, 0.5), network(x, -0.5)])
        tracker.end(outputs)
        assert run.copies == 2
        x = 1.02 * x - 0.1 * (3 * outputs[:1] - 2 * outputs[1:])
    assert run.bound < 0.1, "guided steps fit as well as others"


def test_a_call_that_the_image_does_not_depend_on_is_no_branch(tracker):
    """A run that stopped after its first step, and the same image once more."""
    _, output = call(tracker, image(), 900, text=2.0)
    run, output = call(tracker, image(), 900)
    x = image()
    for time in TIMES[1:]:
        x = 1.02 * x - 0.1 * output
        run, output = call(tracker, x, time)
    assert len(run.branches) == 1


# --- several runs ---------------------------------------------------------------------------------


def test_interleaved_images_are_runs_of_their_own(tracker):
    """Views of a panorama: every step calls the network once for each."""
    xs = [image(i) for i in range(5)]
    runs = {}
    for step, time in enumerate(TIMES):
        for i, x in enumerate(xs):
            run, output = call(tracker, x, time)
            assert runs.setdefault(i, run) is run and run.step == step
            xs[i] = 1.02 * x - 0.1 * output
    assert len({id(run) for run in runs.values()}) == len(tracker.runs) == 5


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


def test_a_failed_call_ends_its_run(tracker):
    x = image()
    first, output = call(tracker, x, 900)
    tracker.begin(Call(800, (1.02 * x - 0.1 * output,)))
    tracker.drop()
    assert not tracker.runs
    assert call(tracker, x, 700)[0] is not first


def test_cleared(tracker):
    first, _ = call(tracker, image(), 900)
    tracker.clear()
    assert call(tracker, image(), 800)[0] is not first


# --- the last step --------------------------------------------------------------------------------


def test_the_last_step_as_the_scheduler_says(tracker):
    seen = []
    for time, last in zip(TIMES, [False] * 4 + [True]):
        run, _ = call(tracker, image(), time, last=last)
        seen.append(run.last)
    assert seen == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("times", "last"),
    [
        (TIMES, 4),
        (range(981, 0, -20), 49),  # DDIM's
        (range(999, 0, -125), 7),
        ((0.999, 0.66, 0.33), 2),
    ],
)
def test_the_last_step_by_the_stride(tracker, times, last):
    seen = []
    for time in times:
        remaining = time / (1 if time < 1 else 1000)
        seen.append(call(tracker, image(), time, remaining=remaining)[0].last)
    assert seen.index(True) == last


def test_nothing_is_kept_after_the_last_step(tracker):
    run, _ = call(tracker, image(), 900)
    state = run.branch.state
    call(tracker, image(), 800)
    assert run.branch.state is state
    call(tracker, image(), 700, last=True)
    assert run.branch.state is not state


def test_the_first_timestep_of_the_run_that_seems_to_go_on(tracker):
    assert tracker.first_time(900) == 900
    call(tracker, image(), 900)
    call(tracker, image(), 800)
    assert tracker.first_time(700) == tracker.first_time(800) == 900
    assert tracker.first_time(950) == 950


# --- what calls contain ---------------------------------------------------------------------------


def test_the_latents_among_the_arguments():
    x, text = image(), torch.zeros(1, 7, 16)
    assert latents_of((x, 7), dict(encoder_hidden_states=text)) == (x,)
    for name in ("sample", "hidden_states", "x"):
        assert latents_of((), {"encoder_hidden_states": text, name: x})[0] is x
    assert latents_of((), dict(timestep=7, noisy=x))[0] is x
    assert len(latents_of(([x, x], 7), {})) == 2
    assert latents_of((), {}) == () and latents_of((7, x), {}) == ()


def test_the_prediction_in_an_output():
    x = image()

    class Output(dict):
        pass

    for output in (x, (x,), (x, None), Output(sample=x), ((x, 3),)):
        assert tensors_of(output)[0] is x and len(tensors_of(output)) == 1
    assert len(tensors_of(([x, x],))) == 2
    assert tensors_of(None) == [] and tensors_of(()) == []


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7])])
def test_timesteps_as_numbers(timestep):
    assert read_timestep(timestep) == (7.0, True)


def test_images_at_different_timesteps():
    assert read_timestep(torch.tensor([7, 5])) == (7.0, False)
    assert read_timestep(None) == (None, True)


def test_runs_of_which_nothing_is_known_are_not_kept(tracker):
    for _ in range(5):
        tracker.begin(Call(500.0, ()))
        tracker.end(None)
    assert len(tracker.runs) == 1


def test_a_list_of_images_of_several_sizes(tracker):
    images = (torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 4), torch.randn(4, 1, 4, 12))
    runs = []
    for time in TIMES:
        runs.append(tracker.begin(Call(float(time), images)))
        outputs = [torch.tanh(x.flip(-1)) for x in images]
        tracker.end(outputs)
        images = tuple(x - 0.1 * y for x, y in zip(images, outputs))
    assert all(run is runs[0] for run in runs)
