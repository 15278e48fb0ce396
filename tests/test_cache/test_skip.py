# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which calls are skipped, what they return instead, and what else goes on as before."""

import copy
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from denoise import STEPS, denoise, denoising, inputs_at, outputs_at
from tiny import QUICK, tiny_inputs, tiny_model, tiny_sd_folder, tiny_unet
from tiny_pipelines import NETWORKS
from tiny_transformers import TRANSFORMERS

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle
from mmagic_tome.cache import PRESETS, StepCacheConfig, coerce_cache
from mmagic_tome.cache.skip import SkipRule, skips_of_run

INPUTS = tiny_inputs()
WIDE = dict(timestep_range=(0.0, 1.0))
BOTH = [dict(**WIDE, region="network"), dict(**WIDE, region="inner")]
EACH = [dict(**WIDE), dict(**WIDE, region="inner")]


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=3)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


def error(a, b):
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def counts(handle):
    return {row["region"]: (row["computed"], row["skipped"]) for row in handle.stats()}


# --- when -----------------------------------------------------------------------------------------


def skipped(num_steps, *configs):
    """Numbers of the steps at which each region is skipped."""
    steps = skips_of_run(coerce_cache(list(configs)), num_steps)
    regions = {config["region"] for config in configs}
    return {one: [i for i, step in enumerate(steps) if one in step] for one in regions}


def test_at_most_interval_minus_one_steps_in_a_row():
    network = dict(region="network", **WIDE)
    assert skipped(9, network) == {"network": [2, 4, 6]}
    assert skipped(9, dict(network, interval=3)) == {"network": [2, 3, 5, 6]}
    assert skipped(9, dict(network, order=0)) == {"network": [1, 3, 5, 7]}
    assert skipped(9, dict(network, order=2)) == {"network": [3, 5, 7]}


def test_only_within_the_range_that_is_half_open():
    # Of ten steps 0.9, 0.8 ... 0 remain.
    network = dict(region="network", order=0)
    assert skipped(10, dict(network, timestep_range=(0.4, 0.7), interval=9)) == {
        "network": [3, 4, 5]
    }
    assert skipped(10, dict(network, timestep_range=(0.5, 0.6), interval=9)) == {"network": [4]}


def test_the_inner_region_counts_the_steps_at_which_the_network_is_computed():
    found = skipped(9, *BOTH)
    assert found == {"network": [2, 4, 6], "inner": [3, 7]}


def test_first_and_last_steps_are_computed():
    for name, configs in PRESETS.items():
        for num_steps in range(1, 60):
            steps = skips_of_run(configs, num_steps)
            assert len(steps) == num_steps
            assert not any([*steps[:2], steps[-1]]), (name, num_steps)


def test_nothing_is_skipped_where_it_is_not_known_how_much_remains():
    rule = SkipRule(StepCacheConfig(**WIDE))
    assert not rule(None, False, known=5)
    assert not rule(0.5, True, known=5)
    assert not rule(0.5, False, known=1)
    assert rule(0.5, False, known=2) and not rule(0.4, False, known=2)


@pytest.mark.parametrize("configs", [EACH[0], EACH[1], BOTH, *PRESETS], ids=str)
def test_a_run_skips_what_is_foreseen(unet, configs):
    """By its timestep alone, and by the timesteps of a scheduler."""
    times = torch.arange(980.0, 0, -50)
    scheduler = SimpleNamespace(timesteps=times)
    pipeline = SimpleNamespace(unet=unet, scheduler=scheduler)
    steps = skips_of_run(coerce_cache(configs), len(times))
    handle = apply_cache(pipeline, configs)
    seen = []
    for _ in denoising(unet, INPUTS, times.tolist()):
        seen.append({row["region"] for row in handle.stats() if row["skipped"]})
        handle.reset_stats()
    assert seen == steps


# --- the network ----------------------------------------------------------------------------------


def polynomial(xs, ys, x):
    """Neville's scheme, another road to the same polynomial."""
    if len(xs) == 1:
        return ys[0]
    a, b = polynomial(xs[:-1], ys[:-1], x), polynomial(xs[1:], ys[1:], x)
    return (a * (x - xs[-1]) - b * (x - xs[0])) / (xs[0] - xs[-1])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_skipped_steps_are_on_the_polynomial_through_the_last_computed_ones(unet, order):
    with apply_cache(unet, **WIDE, order=order) as handle:
        steps = list(denoising(unet, INPUTS))
        seen = counts(handle)
    out = list(range(order + 1, len(STEPS) - 1, 2))
    assert seen == {"network": (len(STEPS) - len(out), len(out))}
    baseline = outputs_at(unet, INPUTS, steps)
    for i, step in enumerate(steps):
        if i not in out:
            assert torch.equal(step.output, baseline[i]), i
            continue
        known = [k for k in range(i) if k not in out][-1 - order :]
        expected = polynomial(known, baseline[known], i)
        torch.testing.assert_close(step.output, expected, atol=1e-4, rtol=1e-4)


def test_extrapolation_is_along_the_timestep_not_the_number_of_the_step(unet):
    times = (900, 800, 500, 200)
    with apply_cache(unet, **WIDE) as handle:
        steps = list(denoising(unet, INPUTS, times))
        assert counts(handle) == {"network": (3, 1)}
    first, second, skipped, _ = (step.output for step in steps)
    torch.testing.assert_close(skipped, second + 3 * (second - first), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [0, 1])
def test_error_feedback_adds_what_was_wrong_at_the_next_computed_step(unet, order):
    with apply_cache(unet, **WIDE, order=order, error_feedback=0.5) as handle:
        steps = list(denoising(unet, INPUTS))
        assert counts(handle)["network"][1] >= 3
        again = list(denoising(unet, INPUTS))
        assert all(torch.equal(a.output, b.output) for a, b in zip(steps, again))
    baseline = outputs_at(unet, INPUTS, steps)
    out = range(order + 1, len(STEPS) - 1, 2)
    for i, step in enumerate(steps):
        if i in out:
            continue
        expected = baseline[i]
        if i - 1 in out:
            wrong = (baseline[i - 2] + baseline[i]) / 2 - steps[i - 1].output
            expected = expected + 0.5 * wrong
        torch.testing.assert_close(step.output, expected, atol=1e-4, rtol=1e-4)


def test_an_error_is_forgotten_with_its_run(unet):
    with apply_cache(unet, **WIDE, error_feedback=1):
        list(denoising(unet, INPUTS, STEPS[:3]))  # ends with a skipped step
        steps = list(denoising(unet, INPUTS, STEPS[:2]))
    for step, expected in zip(steps, outputs_at(unet, INPUTS, steps)):
        assert torch.equal(step.output, expected)


def test_the_skipped_network_does_not_run(unet):
    calls = []
    unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with apply_cache(unet, **WIDE):
        denoise(unet, INPUTS)
    assert len(calls) == 6


@pytest.mark.parametrize("return_dict", [False, True])
def test_the_kind_of_output_stays(unet, return_dict):
    steps = []
    with torch.no_grad(), apply_cache(unet, **WIDE) as handle:
        for time in STEPS:
            steps.append(unet(**inputs_at(INPUTS, time), return_dict=return_dict))
        assert counts(handle) == {"network": (6, 3)}
    assert len({type(output) for output in steps}) == 1
    assert {output[0].shape for output in steps} == {(2, 4, 16, 16)}


def test_outputs_may_be_changed_in_place_by_whoever_gets_them(unet):
    @torch.no_grad()
    def outputs(spoil):
        found = []
        for time in STEPS:
            output = unet(**inputs_at(INPUTS, time)).sample
            found.append(output.clone())
            if spoil:
                output.zero_()
        return torch.stack(found)

    with apply_cache(unet, **WIDE, order=0) as handle:
        expected = outputs(spoil=False)
        assert torch.equal(outputs(spoil=True), expected)
        assert counts(handle)["network"][1] == 8


# --- the inner region -----------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [1, 2])
def test_inner_levels_are_skipped_and_outer_ones_computed(unet, outer):
    calls = {"outer": [], "inner": []}
    unet.down_blocks[outer - 1].register_forward_hook(lambda *_: calls["outer"].append(1))
    unet.down_blocks[outer].resnets[0].register_forward_hook(lambda *_: calls["inner"].append(1))
    with apply_cache(unet, **WIDE, region="inner", num_outer_blocks=outer) as handle:
        steps = list(denoising(unet, INPUTS))
        assert counts(handle) == {"inner": (6, 3)}
    assert (len(calls["outer"]), len(calls["inner"])) == (9, 6)
    for i, (step, expected) in enumerate(zip(steps, outputs_at(unet, INPUTS, steps))):
        assert torch.equal(step.output, expected) == (i not in (2, 4, 6))
        assert error(step.output, expected) < 0.3


def test_inner_levels_are_extrapolated_from_their_last_outputs(unet):
    inner = []
    unet.up_blocks[2].register_forward_pre_hook(
        lambda m, args, kwargs: inner.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with apply_cache(unet, **WIDE, region="inner"):
        denoise(unet, INPUTS)
    assert len(inner) == 9
    torch.testing.assert_close(inner[2], 2 * inner[1] - inner[0])
    torch.testing.assert_close(inner[4], inner[3] + (inner[3] - inner[1]) / 2)


def test_both_skip_inner_levels_where_the_network_is_computed(unet):
    with apply_cache(unet, BOTH) as handle:
        denoise(unet, INPUTS)
        # The network is computed at steps 0 1 3 5 7 8; of those the inner levels at 0 1 5 8.
        assert counts(handle) == {"network": (6, 3), "inner": (4, 2)}


def test_merging_goes_on_in_what_is_computed(unet):
    scheduler = SimpleNamespace(timesteps=torch.tensor(STEPS))
    pipeline = SimpleNamespace(unet=unet, scheduler=scheduler)
    apply_cache(pipeline, **WIDE)
    with apply_tome(pipeline, ratio=0.5, max_downsample=4, plan_interval=2) as handle:
        denoise(unet, INPUTS)
        # Six calls are computed, so three plans each: a skipped step does not count.
        assert {row["plans"] for row in handle.stats()} == {3}
        assert {row["calls"] for row in handle.stats()} == {6}


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EACH)
def test_a_run_begins_by_itself(unet, options):
    with apply_cache(unet, **options):
        first = denoise(unet, INPUTS)
        assert torch.equal(denoise(unet, INPUTS), first)
        # A run that is left in the middle, and other sizes below its timestep.
        list(denoising(unet, INPUTS, STEPS[:4]))
        with torch.no_grad():
            for size in (8, 24):
                other = tiny_inputs(size=size)
                found = unet(**inputs_at(other, 300)).sample
                assert found.shape[-1] == size
        assert torch.equal(denoise(unet, INPUTS), first)


@pytest.mark.parametrize("options", EACH)
def test_another_image_at_a_lower_timestep_is_computed(unet, options):
    other = tiny_inputs(seed=4)
    with apply_cache(unet, **options):
        list(denoising(unet, INPUTS, STEPS[:2]))
        steps = list(denoising(unet, other, (700, 600)))
    for step, expected in zip(steps, outputs_at(unet, other, steps)):
        assert torch.equal(step.output, expected)


@pytest.mark.parametrize("options", EACH)
def test_removal_is_exact_and_leaves_nothing_behind(unet, options):
    baseline, classes = denoise(unet, INPUTS), [type(module) for module in unet.modules()]
    attributes = [set(vars(module)) for module in unet.modules()]
    handle = apply_cache(unet, **options)
    assert not torch.equal(denoise(unet, INPUTS), baseline)
    handle.remove()
    assert torch.equal(denoise(unet, INPUTS), baseline)
    assert [type(module) for module in unet.modules()] == classes
    assert [set(vars(module)) for module in unet.modules()] == attributes


def test_with_gradients_everything_is_computed(unet):
    handle = apply_cache(unet, BOTH)
    with pytest.warns(UserWarning, match="skips nothing while gradients are enabled"):
        for time in STEPS:
            unet(**inputs_at(INPUTS, time)).sample.sum().backward()
    assert {row["skipped"] for row in handle.stats()} == {0}
    assert unet.conv_in.weight.grad is not None
    # It does so for ever, and says it once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet(**INPUTS)
    denoise(unet, INPUTS)
    assert counts(handle)["network"][1] == 3


def test_copies_are_independent_and_pickles_work(unet):
    apply_cache(unet, BOTH)
    expected = denoise(unet, INPUTS)
    list(denoising(unet, INPUTS, STEPS[:3]))
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert type(other) is type(unet) and get_handle(other, "cache").config
        assert torch.equal(denoise(other, INPUTS), expected)
        other.conv_in.weight.data.zero_()
        assert not torch.equal(denoise(other, INPUTS), expected)
        assert torch.equal(denoise(unet, INPUTS), expected)


def test_threads_have_runs_of_their_own(unet):
    with apply_cache(unet, **WIDE) as handle:
        expected = denoise(unet, INPUTS)
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda _: denoise(unet, INPUTS), range(2)))
        assert all(torch.equal(one, expected) for one in found)
        assert counts(handle)["network"][1] == 9


def test_an_exception_leaves_the_model_usable(unet):
    with apply_cache(unet, **WIDE):
        expected = denoise(unet, INPUTS)
        hook = unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoise(unet, INPUTS)
        hook.remove()
        assert torch.equal(denoise(unet, INPUTS), expected)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_beside_hooks_that_replace_forward(unet, first):
    hooks = pytest.importorskip("accelerate.hooks")
    with apply_cache(unet, **WIDE):
        expected = denoise(unet, INPUTS)
    baseline = denoise(unet, INPUTS)
    if first == "theirs":
        hooks.add_hook_to_module(unet, hooks.ModelHook())
    handle = apply_cache(unet, **WIDE)
    if first == "ours":
        hooks.add_hook_to_module(unet, hooks.ModelHook())
    assert torch.equal(denoise(unet, INPUTS), expected)
    handle.remove()
    assert torch.equal(denoise(unet, INPUTS), baseline)


def test_what_the_pipeline_says_ends_a_run(unet):
    handle = apply_cache(unet, **WIDE)
    for says in (False, True):
        loop = denoising(unet, INPUTS)
        next(loop), next(loop)
        if says:
            unet._reset_stateful_cache()
        handle.reset_stats()
        next(loop)
        assert counts(handle) == {"network": (1, 0) if says else (0, 1)}


def test_two_calls_per_step_are_extrapolated_apart(unet):
    texts = [tiny_inputs(seed=seed)["encoder_hidden_states"] for seed in (1, 2)]
    with apply_cache(unet, **WIDE) as handle:
        x, latents, outputs = INPUTS["sample"], [], []
        with torch.no_grad():
            for time in STEPS:
                given = inputs_at(INPUTS, time, x)
                pair = [unet(**{**given, "encoder_hidden_states": text})[0] for text in texts]
                latents.append(x)
                outputs.append(pair)
                x = 1.02 * x - 0.1 * (3 * pair[1] - 2 * pair[0])
        assert counts(handle) == {"network": (12, 6)}
    for branch in range(2):
        ys = [pair[branch] for pair in outputs]
        torch.testing.assert_close(ys[2], 2 * ys[1] - ys[0], atol=1e-4, rtol=1e-4)
        given = {**inputs_at(INPUTS, STEPS[3], latents[3]), "encoder_hidden_states": texts[branch]}
        with torch.no_grad():
            assert torch.equal(ys[3], unet(**given)[0])


# --- warnings and bad input -----------------------------------------------------------------------


def test_a_run_in_which_nothing_was_skipped_is_warned_of(unet):
    apply_cache(unet, timestep_range=(0.1, 0.3))
    with pytest.warns(UserWarning, match="skipped nothing in a run of 4 steps"):
        denoise(unet, INPUTS, (900, 700, 400, 100))
    apply_cache(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoise(unet, INPUTS)


def test_timesteps_that_lie_nowhere_are_warned_of(unet):
    handle = apply_cache(unet, **WIDE)
    with (
        pytest.warns(UserWarning, match="pass the pipeline"),
        pytest.warns(UserWarning, match="not known how much of the run remains"),
    ):
        denoise(unet, INPUTS, (5000, 4000, 3000, 2000))
    assert counts(handle)["network"][1] == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_skip_something_and_stay_close(unet, name):
    times = tuple(range(980, 0, -50))
    baseline = denoise(unet, INPUTS, times)
    with apply_cache(unet, name) as handle:
        outputs = denoise(unet, INPUTS, times)
        assert all(row["skipped"] > 1 for row in handle.stats())
    assert 0 < error(outputs, baseline) < 0.3


def test_a_network_without_an_inner_region_is_refused(unet):
    with pytest.raises(ToMeError, match=r"(?s)inside the.*3 outermost.*region='network'"):
        apply_cache(unet, region="inner", num_outer_blocks=3)
    assert get_handle(unet) is None


# --- other networks -------------------------------------------------------------------------------


def regions_of(network):
    found = []
    for region in ("network", "inner"):
        try:
            apply_cache(network, region=region).remove()
        except ToMeError:
            continue
        found.append(region)
    return found


def check_regions(network, inputs, times=STEPS):
    """Steps 2, 4 and 6 of nine are skipped, in each region; all others are the baseline."""

    def tensor(output):
        while not isinstance(output, torch.Tensor):
            output = output[-1]  # the last of a list, or of a ControlNet's levels
        return output

    for region in regions_of(network):
        with apply_cache(network, **WIDE, region=region) as handle:
            steps = list(denoising(network, inputs, times))
            assert counts(handle) == {region: (6, 3)}
        with torch.no_grad():
            for i, step in enumerate(steps):
                found = tensor(step.output)
                expected = tensor(network(**inputs_at(inputs, step.time, step.latent))[0])
                assert torch.equal(found, expected) == (i not in (2, 4, 6)), (region, i)
        if region == "network":
            first, second, third = (tensor(step.output) for step in steps[:3])
            stride = (times[2] - times[1]) / (times[1] - times[0])
            expected = second + stride * (second - first)
            torch.testing.assert_close(third, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", TRANSFORMERS.values(), ids=lambda family: family.title)
def test_transformers(family):
    network = family.deeper(4).build()
    assert regions_of(network) == ["network", "inner"]
    check_regions(network, lambda time: family.inputs(time=time))


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)
def test_unets(kind):
    network = (kind.layered or kind.build)()
    expected = ["network"] if kind.title == "ControlNet" else ["network", "inner"]
    assert regions_of(network) == expected
    times = STEPS
    if kind.title == "Stable Video Diffusion":
        # ln(sigma) / 4, of Karras' schedule from 700 to 0.002.
        low, high = 0.002 ** (1 / 7), 700 ** (1 / 7)
        times = [1.75 * math.log(high + i / 8 * (low - high)) for i in range(9)]
    check_regions(network, kind.inputs(), times)


def test_mmagics_own_unet(tmp_path):
    pytest.importorskip("mmagic")
    tiny_sd_folder(tmp_path)
    model = tiny_model("native", tmp_path)
    options = {**QUICK, "num_inference_steps": 8, "return_type": "tensor"}

    def image():
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        return model.infer("a tree", latents=latents, **options)["samples"]

    baseline = image()
    with apply_cache(model, "fast") as handle:
        assert not torch.equal(image(), baseline)
        assert handle.stats()[0]["skipped"] >= 2
    assert torch.equal(image(), baseline)
