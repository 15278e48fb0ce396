# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a run shows of its sampler."""

import math

import pytest
import torch
from samplers import SCHEDULERS, scheduler_of

from mmagic_tome.fits import held_elements
from mmagic_tome.runs import Call, RunTracker


def smooth_outputs(batch, seed=0):
    """Outputs that depend smoothly on the timestep, and on the latent as a network's do."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(12, batch, 4, 8, 8, generator=generator)

    def output(x, time, kind):
        # Many directions, so that no output is a combination of the ones before.
        factors = [math.sin(0.5 * (k + 1) * time / 1000 + (1 + k) * kind) for k in range(12)]
        return 0.1 * x + 0.3 * sum(factor * wave for factor, wave in zip(factors, waves))

    return output


def guided_run(name, guidance, batch=2, steps=20, kept=None):
    """Denoise with both halves of guidance in a batch; yield (step, run). Where ``kept`` is, other
    latents are put back at every step, as inpainting does."""
    scheduler, output = scheduler_of(name, steps), smooth_outputs(batch)
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x * scheduler.init_noise_sigma
    tracker = RunTracker(dict)
    noise, clean = x / scheduler.init_noise_sigma, torch.randn(x.shape)
    times = scheduler.timesteps
    for i, time in enumerate(times):
        given = scheduler.scale_model_input(x, time)
        both = torch.cat([given, given])
        call = Call(float(time), (both,), 1 - i / steps, i == steps - 1)
        run = tracker.begin(call)
        uncond, cond = output(given, float(time), 0.0), output(given, float(time), 1.0)
        both = torch.cat([uncond, cond])
        tracker.end(both, computed=both)
        yield i, run
        x = scheduler.step(uncond + guidance * (cond - uncond), time, x).prev_sample
        if kept is not None and i < steps - 1:
            x = torch.where(kept, scheduler.add_noise(clean, noise, times[i + 1 : i + 2]), x)


@pytest.mark.parametrize("guidance", [1.5, 7.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_and_weights_are_read_off_the_run(name, guidance):
    """They are those of the scheduler: how the next inputs answer to a unit of one output."""
    seen = {}
    for i, run in guided_run(name, guidance):
        if run.fitted is not None:
            seen[i - 1] = run.fitted.weights
    for i in range(4, 15):
        uncond, cond = seen[i].tolist()
        assert cond / (cond + uncond) == pytest.approx(guidance, rel=0.06)
        assert cond + uncond == pytest.approx(response(name, i), rel=0.25), i


def response(name, step, steps=20):
    """How much the input three steps on moves if the output of one step is one larger."""
    moved = []
    for extra in (0.0, 1.0):
        scheduler = scheduler_of(name, steps)
        x = torch.zeros(1, 1, 1, 1)
        for i, time in enumerate(scheduler.timesteps[: step + 3]):
            scheduler.scale_model_input(x, time)
            x = scheduler.step(torch.full_like(x, extra * (i == step)), time, x).prev_sample
        moved.append(scheduler.scale_model_input(x, scheduler.timesteps[step + 3]).item())
    return moved[1] - moved[0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_inpainting_puts_back_does_not_count(name):
    """The weights are those of the part that is drawn, the norms those of the whole."""
    kept = torch.zeros(8, 8, dtype=torch.bool)
    kept[:, 3:] = True
    plain = {i: run.fitted for i, run in guided_run(name, 7.5)}
    looked_at = 0
    for i, run in guided_run(name, 7.5, kept=kept):
        if run.fitted is None or run.fitted.weights is None or i < 5:
            continue
        free = run.free.unflatten(1, (4, 8, 8))
        assert not free[..., 3:].any() and free[..., :3].float().mean() > 0.95
        assert run.fitted.weights == pytest.approx(plain[i].weights, rel=0.1)
        assert run.fitted.norms == pytest.approx(run.input[:2].norm(dim=1).numpy())
        looked_at += 1
    assert looked_at == 14  # all from the sixth step on but the last


def test_nothing_is_held_where_all_elements_are_free():
    x, last, previous = torch.randn(3, 2, 500)
    assert not held_elements(x, last, previous).any()
    # Nor where the network adds nothing at all.
    assert not held_elements(0.7 * last - 0.2 * previous, last, previous).any()
    mixed = torch.where(torch.arange(500) < 100, 0.7 * last - 0.2 * previous, x)
    held = held_elements(mixed, last, previous)
    assert held[:, :100].all() and held.sum() < 203  # others may fit by chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("what", ["middle", "right", "nearly all"])
def test_parts_of_any_shape_are_found(what, dtype):
    """Each image of a batch has its own; at 4 x 64 x 64 with a stride, as runs sample it."""
    kept = torch.zeros(2, 4, 64, 64, dtype=torch.bool)
    place = {"middle": (slice(8, 56),) * 2, "right": (slice(64), slice(20, 64))}
    kept[(0, slice(4), *place.get(what, (slice(2, 64), slice(64))))] = True
    kept[1, :, :30] = True
    generator = torch.Generator().manual_seed(0)
    x, last, previous = torch.randn(3, 2, 4, 64, 64, generator=generator)
    x = torch.where(kept, 0.7 * last.to(dtype) - 0.2 * previous.to(dtype), x).to(dtype).float()
    x, last, previous, kept = (y.flatten(1)[:, ::5] for y in (x, last, previous, kept))
    rounding = torch.finfo(dtype).eps
    held = held_elements(x, last.to(dtype).float(), previous.to(dtype).float(), 4 * rounding)
    assert (held & kept).sum() > 0.9 * kept.sum()
    assert (held & ~kept).sum() <= 0.06 * (~kept).sum()
