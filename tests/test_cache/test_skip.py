# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which calls are skipped, what they return instead, and what else goes on as before."""

import math
from types import SimpleNamespace

import pytest
import torch
from denoise import STEPS, denoise, denoising, inputs_at, outputs_at
from diffusers import FlowMatchEulerDiscreteScheduler
from fixed_steps import FIXED, skips_of_run
from tiny import error, tiny_inputs
from tiny_transformers import TRANSFORMERS
from tiny_unets import NETWORKS

from mmagic_tome import ToMeError, apply_cache, get_handle

INPUTS = tiny_inputs()
WIDE = dict(timestep_range=(0.0, 1.0))
BOTH = [dict(**WIDE, region="network"), dict(**WIDE, region="inner")]
EACH = [dict(**WIDE), dict(**WIDE, region="inner", error_feedback=1)]


def counts(handle):
    return {row["region"]: (row["computed"], row["skipped"]) for row in handle.stats()}


# --- when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "options", "expected"),
    [
        # At most interval - 1 in a row, once as many outputs are known as the order needs.
        (9, WIDE, [2, 4, 6]),
        (9, dict(**WIDE, interval=3), [2, 3, 5, 6]),
        (9, dict(**WIDE, order=0), [1, 3, 5, 7]),
        (9, dict(**WIDE, order=2), [3, 5, 7]),
        # Of ten steps 0.9, 0.8 ... 0 remain; the range is half-open.
        (10, dict(timestep_range=(0.4, 0.7), interval=9, order=0), [3, 4, 5]),
        (10, dict(timestep_range=(0.5, 0.6), interval=9, order=0), [4]),
    ],
)
def test_steps_that_are_skipped(num_steps, options, expected):
    steps = skips_of_run(options, num_steps)
    assert [i for i, step in enumerate(steps) if "network" in step] == expected


def test_first_and_last_steps_are_computed():
    for name, configs in FIXED.items():
        for num_steps in range(1, 60):
            steps = skips_of_run(configs, num_steps)
            assert len(steps) == num_steps
            assert not any([*steps[:2], steps[-1]]), (name, num_steps)


@pytest.mark.parametrize("configs", [*EACH, BOTH, *FIXED.values()], ids=str)
def test_a_run_skips_what_is_foreseen(unet, configs):
    """By its timestep alone, and by the timesteps of a scheduler."""
    times = torch.arange(980.0, 0, -50)
    pipeline = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=times))
    handle = apply_cache(pipeline, configs)
    seen = []
    for _ in denoising(unet, INPUTS, times.tolist()):
        seen.append({row["region"] for row in handle.stats() if row["skipped"]})
        handle.reset_stats()
    assert seen == skips_of_run(configs, len(times))


# --- the network ----------------------------------------------------------------------------------


def polynomial(xs, ys, x):
    """Neville's scheme, another road to the same polynomial."""
    if len(xs) == 1:
        return ys[0]
    a, b = polynomial(xs[:-1], ys[:-1], x), polynomial(xs[1:], ys[1:], x)
    return (a * (x - xs[-1]) - b * (x - xs[0])) / (xs[0] - xs[-1])


@pytest.mark.parametrize("times", [STEPS, (900, 850, 700, 660, 500, 450, 225)])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_skipped_steps_are_on_the_polynomial_through_the_last_computed_ones(unet, order, times):
    calls = []
    with apply_cache(unet, **WIDE, order=order) as handle:
        with unet.conv_in.register_forward_hook(lambda *_: calls.append(1)):
            steps = list(denoising(unet, INPUTS, times))
        seen = counts(handle)
    out = list(range(order + 1, len(times) - 1, 2))
    assert seen == {"network": (len(times) - len(out), len(out))}
    assert len(calls) == len(times) - len(out)
    baseline = outputs_at(unet, INPUTS, steps)
    for i, step in enumerate(steps):
        if i not in out:
            assert torch.equal(step.output, baseline[i]), i
            continue
        known = [k for k in range(i) if k not in out][-1 - order :]
        # Along the timestep, not the number of the step.
        expected = polynomial([times[k] for k in known], baseline[known], times[i])
        torch.testing.assert_close(step.output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("order", [0, 1])
def test_error_feedback_adds_what_was_wrong_but_at_the_last_step(unet, order, interval):
    options = dict(**WIDE, order=order, interval=interval, error_feedback=0.5)
    with apply_cache(unet, **options):
        steps = list(denoising(unet, INPUTS))
    baseline = outputs_at(unet, INPUTS, steps)
    skips = skips_of_run(options, len(steps))
    computed = [i for i, step in enumerate(skips) if not step]
    for before, i in zip([0, *computed], computed):
        expected = baseline[i]
        # Nothing at the last step, whose output changes faster than the line between tells.
        for j in range(before + 1, i) if i < len(steps) - 1 else ():
            # The truth at a skipped step is on the line between the computed neighbours.
            truth = torch.lerp(baseline[before], baseline[i], (j - before) / (i - before))
            expected = expected + 0.5 * (truth - steps[j].output)
        torch.testing.assert_close(steps[i].output, expected, atol=1e-4, rtol=1e-4)


# --- the inner region -----------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [1, 2])
def test_inner_levels_are_skipped_and_outer_ones_computed(unet, outer):
    calls, inner = {"outer": [], "inner": []}, []
    unet.down_blocks[outer - 1].register_forward_hook(lambda *_: calls["outer"].append(1))
    unet.down_blocks[outer].resnets[0].register_forward_hook(lambda *_: calls["inner"].append(1))
    unet.up_blocks[-outer].register_forward_pre_hook(
        lambda m, args, kwargs: inner.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with apply_cache(unet, **WIDE, region="inner", num_outer_blocks=outer) as handle:
        steps = list(denoising(unet, INPUTS))
        assert counts(handle) == {"inner": (6, 3)}
    assert (len(calls["outer"]), len(calls["inner"]), len(inner)) == (9, 6, 9)
    # They are extrapolated from their last outputs.
    torch.testing.assert_close(inner[2], 2 * inner[1] - inner[0])
    torch.testing.assert_close(inner[4], inner[3] + (inner[3] - inner[1]) / 2)
    for i, (step, expected) in enumerate(zip(steps, outputs_at(unet, INPUTS, steps))):
        assert torch.equal(step.output, expected) == (i not in (2, 4, 6))
        assert error(step.output, expected) < 0.3


# --- other networks -------------------------------------------------------------------------------


def check_regions(network, inputs, times=STEPS, regions=("network", "inner")):
    """Steps 2, 4 and 6 of nine are skipped, in each region; all others are the baseline."""

    def tensor(output):
        while not isinstance(output, torch.Tensor):
            output = output[-1]  # the last of a list, or of a ControlNet's levels
        return output

    for region in regions:
        with apply_cache(network, **WIDE, region=region) as handle:
            steps = list(denoising(network, inputs, times))
            assert counts(handle) == {region: (6, 3)}
        outputs = [tensor(step.output) for step in steps]
        with torch.no_grad():
            for i, step in enumerate(steps):
                expected = tensor(network(**inputs_at(inputs, step.time, step.latent))[0])
                assert torch.equal(outputs[i], expected) == (i not in (2, 4, 6)), (region, i)
        if region == "network":
            stride = (times[2] - times[1]) / (times[1] - times[0])
            expected = outputs[1] + stride * (outputs[1] - outputs[0])
            torch.testing.assert_close(outputs[2], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", TRANSFORMERS.values(), ids=lambda family: family.title)
def test_transformers(family):
    check_regions(family.deeper(4).build(), lambda time: family.inputs(time=time))


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)
def test_unets(kind):
    network = (kind.layered or kind.build)()
    regions, num_levels = ("network", "inner"), 2
    if kind.title == "ControlNet":  # its levels only go down
        regions, num_levels = ("network",), 1
    with pytest.raises(ToMeError, match=rf"the\s+{num_levels} outermost.*region='network'"):
        apply_cache(network, region="inner", num_outer_blocks=num_levels)
    assert get_handle(network) is None
    times = STEPS
    if kind.title == "Stable Video Diffusion":
        # ln(sigma) / 4, of Karras' schedule from 700 to 0.002.
        low, high = 0.002 ** (1 / 7), 700 ** (1 / 7)
        times = [1.75 * math.log(high + i / 8 * (low - high)) for i in range(9)]
    check_regions(network, kind.inputs(), times, regions)


# --- other timesteps and inputs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "steps", "dtype", "expected"),
    [
        # A shifted schedule spends few steps at low timesteps, and skips as many all the same.
        (7.0, 20, torch.float32, {6}),
        # Timesteps in half precision repeat, and a line needs two different ones: at most a step
        # or two less than with exact ones.
        (5.0, 100, torch.bfloat16, range(24, 29)),
    ],
)
def test_flow_matching(shift, steps, dtype, expected):
    network = TRANSFORMERS["Flux.1"].deeper(4).build()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    handle = apply_cache(SimpleNamespace(transformer=network, scheduler=scheduler), FIXED["both"])
    scheduler.set_timesteps(steps)
    times = (scheduler.timesteps / 1000).to(dtype)
    assert (len(times.unique()) < steps) == (dtype == torch.bfloat16)
    inputs = TRANSFORMERS["Flux.1"].inputs()
    for _ in range(2):
        handle.reset_stats()
        denoise(network, lambda time: {**inputs, "timestep": time.expand(2)}, times)
        assert counts(handle)["network"][1] in expected


def test_images_of_several_sizes_in_one_call():
    """Z-Image takes a list."""
    family = TRANSFORMERS["Z-Image"].deeper(4)

    def at(time):
        inputs = family.inputs(time=time)
        return {**inputs, "x": [inputs["x"][0], inputs["x"][1][..., :4]]}

    network = family.build()
    handle = apply_cache(network, **WIDE)
    list(denoising(network, at, STEPS))
    assert counts(handle) == {"network": (6, 3)}
