# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs that keep a tolerance: predicted errors, decisions, and what a pipeline shows of them."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from denoise import denoised as denoise
from diffusers import DDIMScheduler, PNDMScheduler
from samplers import SCHEDULERS, TRAINED, scheduler_of
from tiny import tiny_unet

from mmagic_tome import apply_cache
from mmagic_tome.cache.extrapolate import extrapolate
from mmagic_tome.cache.skip import CachePatch
from mmagic_tome.cache.tolerance import REGIONS, Budget, relative_errors
from mmagic_tome.fits import Fit, fit_input
from mmagic_tome.models import ADAPTERS, find_adapter


def test_the_second_difference_predicts_a_parabola_exactly():
    """A line through two points of a parabola errs by the divided difference; any weights. So
    steady an output is extrapolated along the line."""
    times, time = [900.0, 850.0, 700.0], 640.0
    curve, slope, start = torch.randn(3, 2, 6, 2).double()
    last = torch.randn(2, 6).double()

    def at(t):
        return start + slope * t / 1000 + curve * (t / 1000) ** 2

    outputs = [at(t) for t in times]
    rates = [(b - a) / (t1 - t0) for a, b, t0, t1 in zip(outputs, outputs[1:], times, times[1:])]
    weights = torch.tensor([0.3, -1.1]).double()
    x = last + (outputs[-1] * weights).sum(-1) + (outputs[-2] * 0).sum(-1)
    parts = {0: [outputs[-1][..., 0]], 1: [outputs[-1][..., 1]]}
    columns = [[rate[..., 0], rate[..., 1]] for rate in rates]
    fit = fit_input(x, last, None, parts, columns, copies=1, whole=x)
    assert fit.weights == pytest.approx(weights.numpy())
    line = outputs[-1] + (time - times[-1]) * rates[-1]
    true = ((at(time) - line) * weights).sum(-1).norm(dim=1) / x.norm(dim=1)
    budget = Budget(0.01)
    factor = abs((time - times[-1]) * (time - times[-2]))
    assert budget._curvature(fit, times) * factor == pytest.approx(true.numpy())
    assert budget.slope is None


@pytest.mark.parametrize("ratio", [-1.0, -0.4, 0.0, 0.5])
def test_outputs_that_alternate_or_level_off_are_foreseen(ratio):
    """Changes that are ``ratio`` times the change before: the slope is that, and nothing errs."""
    generator = torch.Generator().manual_seed(0)
    start, change = torch.randn(2, 1, 4, 2, 2, generator=generator).double()
    outputs = [start]
    for k in range(5):
        outputs.append(outputs[-1] + change * ratio**k)
    times = [900.0, 800.0, 700.0]
    rates = [((b - a) / -100).flatten(1) for a, b in zip(outputs[1:], outputs[2:4])]
    products = torch.einsum("kbn,lbn->bkl", torch.stack(rates), torch.stack(rates))
    fit = Fit(0.0, {}, np.ones(1), products[:, :, None, :, None].numpy(), np.ones(1))
    budget = Budget(0.01)
    assert budget._curvature(fit, times) == pytest.approx(0, abs=1e-9)
    assert budget.slope.item() == pytest.approx(ratio)
    guess = extrapolate(times[1:], outputs[2:4], 600.0, budget.slope)
    torch.testing.assert_close(guess, outputs[4])


def test_a_slope_per_image_and_the_same_for_its_copies():
    before, after = torch.zeros(4, 3), torch.ones(4, 3)
    guess = extrapolate([2.0, 1.0], [before, after], 0.0, torch.tensor([1.0, -0.5]))
    assert guess[:, 0].tolist() == [2.0, 0.5, 2.0, 0.5]


def one_fit(error, rate=0.0):
    """A fit that predicts these errors, per image, for timesteps 3, 2, 1 and a skip at 0; with a
    rate of change of 1 the output is on a line but for the error."""
    rates = np.full((len(error), 2, 1, 2, 1), rate)
    rates[:, 0, 0, 1, 0] = rates[:, 1, 0, 0, 0] = rate * (rate + np.array(error))
    rates[:, 1, 0, 1, 0] = np.square(rate + np.array(error))
    return Fit(0.0, {}, np.ones(1), rates, np.ones(len(error)))


def decide(budget, error, remaining, last=False, rate=0.0):
    fit = one_fit(error, rate)
    run = SimpleNamespace(fitted=fit, times=[3.0, 2.0, 1.0], remaining=remaining, last=last)
    return budget.decide(run, 0.0, dict.fromkeys(REGIONS, (2.0, 1.0)))


def test_the_cheapest_region_that_keeps_the_budget_is_skipped():
    for error, chosen in ((0.001, "network"), (0.01, "inner"), (0.03, "innermost"), (1.0, None)):
        budget = Budget(0.01)
        decide(budget, [10.0], 1.0)  # the stride of the schedule is not known yet
        assert decide(budget, [error], 0.9) == chosen
        assert budget.skipped == [None, chosen]
        spent = 0 if chosen is None else error * relative_errors()[chosen]
        assert budget.predicted == ([] if chosen is None else pytest.approx([spent]))
    for last, tolerance in ((True, 0.01), (False, 0.0)):
        budget = Budget(tolerance)
        decide(budget, [10.0], 1.0)
        assert decide(budget, [1e-9], 0.9, last) is None


def test_errors_since_a_computed_step_are_summed():
    """They follow one line, so they err to one side."""
    budget = Budget(0.05)
    for i, error in enumerate([10.0, 0.001, 0.002, 10.0, 0.001]):
        decide(budget, [error], 1 - i / 100, rate=1.0)
    assert budget.skipped == [None, "network", "network", None, "network"]
    own = relative_errors()["network"]
    assert budget.predicted == pytest.approx([own * (0.003**2 + 0.001**2) ** 0.5])


def test_right_before_the_end_no_second_step_in_a_row_is_skipped():
    """Outputs change faster there than the steps before tell."""
    for left, second in ((3, "network"), (2, "inner")):
        budget = Budget(0.5)
        for remaining in (left + 1, left, left - 1):  # strides of 1
            decide(budget, [1e-4], float(remaining), rate=1.0)
        assert budget.skipped == [None, "network", second], left


def test_errors_of_regions_are_those_of_the_model_and_the_scheduler():
    assert relative_errors() == pytest.approx({"network": 0.7, "inner": 0.18, "innermost": 0.09})
    unet = find_adapter(tiny_unet())[0]
    transformer = next(one for one in ADAPTERS if "SD3Transformer2DModel" in one.class_names)
    found = relative_errors(unet.inner_errors, 3.0, alternating=True)
    assert found == pytest.approx({"network": 3.0, "inner": 0.9, "innermost": 0.3})
    # Inside a transformer hardly anything is to be had that the whole does not give.
    assert min(relative_errors(transformer.inner_errors).values()) > 0.5


def test_a_run_spends_at_most_its_tolerance_and_the_worst_image_decides():
    steps, generator = 50, torch.Generator().manual_seed(0)
    alone, together = [], []
    errors = torch.rand(steps, 3, generator=generator) * 0.01
    for images in ([0], [1], [2], [0, 1, 2]):
        budget = Budget(0.02)
        for i in range(steps):
            decide(budget, errors[i, images].tolist(), 1 - i / steps, i == steps - 1)
        assert max(budget.predicted) <= 0.02
        assert any(budget.skipped)
        # The network at most twice in a row; an inner region never, of the steps in between.
        row = "".join("." if one == "network" else "i" if one else "#" for one in budget.skipped)
        assert "..." not in row and "ii" not in row.replace(".", "")
        (alone if len(images) == 1 else together).append(budget)
    skipped = [sum(one is not None for one in budget.skipped) for budget in alone]
    assert sum(one is not None for one in together[0].skipped) <= max(skipped)


# --- networks -------------------------------------------------------------------------------------


def pipeline_of(unet, name="DDIM", steps=20):
    return SimpleNamespace(unet=unet, scheduler=scheduler_of(name, steps))


def relative(x, y):
    return float(((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).max())


@pytest.fixture
def pipeline():
    return pipeline_of(tiny_unet())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_smaller_tolerance_is_closer_and_zero_is_the_baseline(name):
    pipeline = pipeline_of(tiny_unet(), name)
    baseline = denoise(pipeline)
    errors, skipped = [], []
    for tolerance in (0.0, 0.003, 0.03, 0.3):
        with apply_cache(pipeline, tolerance=tolerance) as handle:
            found = denoise(pipeline)
            assert torch.equal(denoise(pipeline), found), "a second run is the same"
        errors.append(relative(found, baseline))
        skipped.append(sum(row["skipped"] for row in handle.stats()))
        predicted = max(handle.predicted_error or [0.0])
        assert predicted <= tolerance
        # The inner levels of random weights matter more than those of a trained network.
        assert errors[-1] <= 10 * max(predicted, 1e-6)
    assert torch.equal(denoise(pipeline), baseline)
    assert errors[0] == 0 and skipped[0] == 0
    assert skipped == sorted(skipped) and skipped[-1] > skipped[0]
    assert errors == sorted(errors)


def test_what_a_run_says_of_itself(pipeline):
    handle = apply_cache(pipeline, tolerance=0.1)
    assert handle.predicted_error is handle.steps is handle.speedup is None
    assert "tolerance 0.1 (not run yet)" in handle.summary()
    denoise(pipeline)
    assert len(handle.steps) == 20 and set(handle.steps) <= {"computed", *REGIONS}
    # Every step is counted once: skipped as a whole, in part, or computed.
    rows = {row["region"]: row for row in handle.stats()}
    assert list(rows) == ["network", "inner"]  # two levels have one inside
    assert {name: handle.steps.count(name) for name in rows} == {
        name: row["skipped"] for name, row in rows.items()
    }
    assert handle.steps[-1] == "computed" == handle.steps[0]
    summary = handle.summary()
    assert "last run: #" in summary and f"{handle.predicted_error[0]:.4f}" in summary
    assert f"{handle.speedup:.2f} times as fast" in summary
    handle.reset_stats()
    assert handle.steps is None


def test_the_speed_up_of_a_run_is_that_of_its_steps():
    budget = Budget(0.1, skipped=[None, None, "network", None, None])
    assert budget.speedup is None
    budget.began = [0.0, 8.0, 10.0, 10.5, 12.5]  # the first step compiles, say; the last is open
    assert budget.speedup == pytest.approx(4 * 2.0 / 12.5)
    assert Budget(0.1, skipped=[None], began=[0.0]).speedup is None


def test_predictions_rest_on_what_was_computed(pipeline, monkeypatch):
    """Extrapolated outputs, and what error feedback adds, say nothing of the network."""
    computed = []
    output = CachePatch.output

    def watched(patch, region, proceed, args, kwargs):
        def noted(*args, **kwargs):
            computed.append(proceed(*args, **kwargs))
            return computed[-1]

        return output(patch, region, noted if region == "network" else proceed, args, kwargs)

    monkeypatch.setattr(CachePatch, "output", watched)
    seen = []
    decide = Budget.decide

    def decided(budget, run, time, known):
        seen.append((time, list(run.times), [one.clone() for one in run.branch.computed]))
        seen[-1] += (decide(budget, run, time, known),)
        return seen[-1][-1]

    monkeypatch.setattr(Budget, "decide", decided)
    apply_cache(pipeline, tolerance=0.3)
    denoise(pipeline)
    times = [time for time, *_, chosen in seen if chosen != "network"]
    assert 5 < len(times) == len(computed) < 20
    for time, kept, samples, _ in seen[3:]:
        before = [one for one in times if one > time]
        assert kept == before[-3:]
        for sample, found in zip(samples, computed[: len(before)][-3:]):
            assert torch.equal(sample, found.sample.flatten(1))


def test_only_the_inner_region_on_request(pipeline):
    with apply_cache(pipeline, tolerance=0.5, region="inner") as handle:
        denoise(pipeline)
        skipped = set(handle.steps)
    assert "network" not in skipped and "inner" in skipped


def test_a_run_in_which_nothing_can_be_skipped_says_so(pipeline):
    apply_cache(pipeline, tolerance=1e-9)
    with pytest.warns(UserWarning, match="the tolerance is too small"):
        denoise(pipeline)


@pytest.mark.parametrize(
    "title",
    ["Stable Diffusion 1.x", "image to image", "ControlNet", "Z-Image", "Wan 2.1, 2.2 (video)"],
)
def test_pipelines(title):
    """One or two forwards per step, timesteps of 1000 and of 1, latents in lists and clips."""
    from tiny_pipelines import PIPELINES

    case = PIPELINES[title]
    pipeline = case.pipeline()
    baseline = case.run(pipeline, num_inference_steps=10)
    with apply_cache(pipeline, tolerance=0.5) as handle:
        latents = case.run(pipeline, num_inference_steps=10)
        assert "network" in handle.steps and handle.steps[-1] == "computed"
        # Random weights: not as smooth as what the prediction is made for.
        assert 0 < relative(latents, baseline) < 4 * max(handle.predicted_error)
        assert torch.equal(case.run(pipeline, num_inference_steps=10), latents)
    with apply_cache(pipeline, tolerance=0):
        assert torch.equal(case.run(pipeline, num_inference_steps=10), baseline)
    assert torch.equal(case.run(pipeline, num_inference_steps=10), baseline)


def test_a_scheduler_that_amplifies_gets_no_feedback_and_skips_less():
    """PNDM makes an error that alternates 6.7 times as large."""
    trained = dict(prediction_type="v_prediction", **TRAINED)
    skipped = {}
    for name, kind in (("PNDM", PNDMScheduler), ("DDIM", DDIMScheduler)):
        options = dict(skip_prk_steps=True) if name == "PNDM" else dict(clip_sample=False)
        pipeline = SimpleNamespace(unet=tiny_unet(), scheduler=kind(**trained, **options))
        baseline = denoise(pipeline)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle = apply_cache(pipeline, tolerance=0.2)
        (patch,) = handle._patches
        states = patch.new_states()
        assert all((one.config.error_feedback > 0) == (name == "DDIM") for one in states.values())
        error = relative(denoise(pipeline), baseline)
        skipped[name] = len(handle.steps) - handle.steps.count("computed")
        assert error <= 5 * handle.predicted_error[0]
    assert 0 < skipped["PNDM"] < skipped["DDIM"]
