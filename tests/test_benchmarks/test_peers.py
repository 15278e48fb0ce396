# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching by other authors: formulas by hand, decisions on made-up runs, tiny pipelines."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import PIPELINES

from benchmarks.peers import (
    adaptive_diffusion,
    easycache,
    fbcache,
    levels,
    sada,
    spectrum,
    taylorseer,
    zeus,
)
from benchmarks.peers.skipping import Call, History, Skipping
from mmagic_tome.errors import ToMeError


def walk(peer, steps, output, sample=lambda step: torch.tensor([float(step)])):
    """Run a method without a network: what each step returned, and which steps were computed.

    ``output`` and ``sample`` take the number of a step.
    """
    history, found = History(), []
    for step in range(steps):
        call = Call(step, steps, float(steps - step), sample(step), 0, None)
        if peer.skips(call, history):
            found.append(peer.estimate(call, history))
            continue
        found.append(output(step))
        history.steps.append(step)
        history.inputs.append(call.sample)
        history.outputs.append(found[-1])
        peer.computed(call, history)
    return found, history.steps


def square(step):
    return torch.tensor([float(step**2)])


def straight(step):
    """Changes by 0.5 and has the size 10."""
    return torch.tensor([10 + step / 2, 10 - step / 2])


def pair(step):
    return torch.tensor([float(step)] * 2)


SQUARES, PAIRS = (square,), (straight, pair)
OF_THE_PAPER = "#####.#.#..#...#....#....#.....#......#.......#..."


@pytest.mark.parametrize(
    ("peer", "of_step", "computed", "values"),
    [
        # The line through 9 and 16, and 16 itself; later the line through 16 and 64.
        (zeus.Zeus(4), SQUARES, "#####...#...#...#.##", {5: 23, 6: 16, 7: 23, 9: 112, 10: 64}),
        (zeus.Zeus(4, spaced=True), SQUARES, "#####...#...#...#.##", {9: 64 + (64 - 16) / 4}),
        # As many as the authors report for their 3.5 times.
        (spectrum.Spectrum(**spectrum.PAPER), SQUARES, OF_THE_PAPER, {}),
        # 0.05 a step: two steps stay below 0.12. Step 3: its input and what step 1 added to it.
        (easycache.EasyCache(0.12), PAIRS, "##..#..#.#", {3: (3 + 10.5 - 1, 3 + 9.5 - 1)}),
        # From step 3 on. Steps 5 and 6 predict 0.18 and 0.53, above 0.5 together. From the fourth
        # computed step on the threshold is 1: steps 9 and 10 predict 0.15 and 0.45, step 11 0.91.
        (easycache.UCache(), PAIRS, "#####.#.#..#..#..#.#", {}),
        (
            taylorseer.TaylorSeer(1, interval=3),
            SQUARES,
            "###..#..#.",
            {3: 4 + 3, 4: 4 + 6, 6: 25 + 7},
        ),
    ],
)
def test_steps_that_are_computed_and_what_the_others_return(peer, of_step, computed, values):
    found, steps = walk(peer, len(computed), *of_step)
    assert "".join("#" if i in steps else "." for i in range(len(computed))) == computed
    for step, value in values.items():
        assert found[step].tolist() == list(value if isinstance(value, tuple) else (value,))


@pytest.mark.parametrize("degree, ridge", [(4, 0.1), (3, 1.0), (2, 1e-9)])
def test_ridge_weights_are_the_least_squares_solution(degree, ridge):
    times, at = [-1.0, -0.9, -0.8, -0.7, -0.5, -0.2], 0.1
    values = np.random.default_rng(0).normal(size=(6, 3))
    design = np.polynomial.chebyshev.chebvander(times, degree)
    # Ridge regression is least squares with rows of sqrt(ridge) that want all coefficients zero.
    rows = np.vstack([design, ridge**0.5 * np.eye(degree + 1)])
    coefficients = np.linalg.lstsq(rows, np.vstack([values, np.zeros((degree + 1, 3))]))[0]
    expected = np.polynomial.chebyshev.chebvander([at], degree) @ coefficients
    weights = spectrum.ridge_weights(times, at, degree, ridge).numpy()
    np.testing.assert_allclose(weights @ values, expected[0], rtol=1e-7)


def test_spectrum_mixes_the_fit_and_the_line():
    options = dict(degree=1, ridge=0.0, window=2, growth=0, warmup=3, space="output")
    # Least squares through 0, 1, 4 at steps 0, 1, 2: the line 2 s - 1/3. The last two: 4 + 3.
    for mix, expected in ((1, 6 - 1 / 3), (0, 7), (0.5, 6.5 - 1 / 6)):
        found, computed = walk(spectrum.Spectrum(mix=mix, **options), 6, square)
        assert computed == [0, 1, 2, 4]
        assert float(found[3]) == pytest.approx(expected, rel=1e-6)
    users = spectrum.Spectrum(**{**options, "slope": 0.5, "mix": 0})
    assert float(walk(users, 6, square)[0][3]) == 4 + 3 / 2


# --- first-block cache ----------------------------------------------------------------------------


def test_fbcache_compares_with_the_last_computed_residual():
    assert fbcache.relative_change(torch.tensor([3.0, -2.0]), torch.tensor([2.0, -2.0])) == 0.25
    peer = fbcache.FBCache(threshold=0.3, max_skips=2)
    found = []
    for step, value in enumerate((10.0, 12.0, 14.0, 15.0, 15.0, 15.0, 15.0)):
        call = Call(step, 7, 7.0 - step, torch.zeros(1), 0, None)
        found.append(peer.decide(call, torch.tensor([value])))
    assert found == [False, True, False, True, True, False, True]


def test_adaptive_diffusion_looks_at_the_third_difference():
    assert adaptive_diffusion.is_stable([3.0, 2.0, 1.0], 0.0)
    assert adaptive_diffusion.is_stable([4.0, 2.0, 1.0], 0.25)
    assert not adaptive_diffusion.is_stable([4.0, 2.0, 1.0], 0.24)


def test_adaptive_diffusion_computes_four_steps_and_every_fifth():
    peer, history, skips = adaptive_diffusion.AdaptiveDiffusion(0.01, max_skips=4), History(), []
    for step in range(12):
        call = Call(step, 12, 12.0 - step, torch.zeros(1), 0, None)
        skips.append(peer.skips(call, history))
        peer.stepped(call, torch.zeros(1), torch.tensor([float(step)]))  # constant change
    assert skips == [False] * 4 + [True] * 4 + [False] + [True] * 3


def test_sada_extrapolates_by_three_rates():
    rates = [torch.tensor([value]) for value in (8.0, 4.0, 2.0)]
    # 5 + 3 - 0.75 = 7.25
    assert float(sada.extrapolated(torch.tensor([1.0]), rates, 2.0)) == 1 - 2 * 7.25
    # The rates bend by 8 - 2 * 4 + 2 = 2.
    assert sada.is_stable(torch.tensor([0.0]), torch.tensor([1.0]), rates)
    assert not sada.is_stable(torch.tensor([1.0]), torch.tensor([0.0]), rates)


def test_sada_lagrange_reproduces_a_cubic():
    steps = (1, 5, 9, 13)
    values = [torch.tensor([float(step**3)], dtype=torch.float64) for step in steps]
    assert float(sada.lagrange(steps, values, 15)) == pytest.approx(15**3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_outputs_and_clean_latents_convert_into_each_other(kind):
    x, output, level = torch.tensor([2.0]), torch.tensor([-3.0]), levels.Level(0.6, 0.8)
    clean = levels.denoised_of(output, x, level, kind)
    assert float(levels.output_of(clean, x, level, kind)) == pytest.approx(-3)
    noise = levels.noise_of(output, x, level, kind)
    assert float(0.6 * clean + 0.8 * noise) == pytest.approx(2)


def test_taylorseer_expands_about_the_last_computed_step():
    first = taylorseer.update_derivatives([], square(0), 1, 2)
    second = taylorseer.update_derivatives(first, square(2), 2, 2)
    third = taylorseer.update_derivatives(second, square(4), 2, 2)
    assert [float(one) for one in third] == [16, 6, 2]
    assert float(taylorseer.expand(third, 1)) == 16 + 6 + 1
    assert float(taylorseer.expand(third[:2], 3)) == 16 + 18


# --- pipelines ------------------------------------------------------------------------------------

STEPS = 12
# Name -> its most conservative setting, which skips nothing, and a strong one.
PEERS = {
    "zeus": (zeus.method(1), zeus.method(3)),
    **{
        name: (
            spectrum.method(**{**options, "window": 1, "growth": 0}),
            spectrum.method(**options),
        )
        for name, options in (("spectrum", spectrum.PAPER), ("spectrum users", spectrum.USERS))
    },
    "easycache": (easycache.method(0), easycache.method(5)),
    "ucache": (easycache.ucache(0), easycache.ucache(50)),
    "fbcache": (fbcache.method(0), fbcache.method(5)),
    "adaptive diffusion": (adaptive_diffusion.method(max_skips=0), adaptive_diffusion.method(2)),
    "sada": (sada.method(0), sada.method(2)),
    "taylorseer": (taylorseer.method(interval=1), taylorseer.method(interval=3)),
}


@pytest.fixture(scope="module")
def case():
    return PIPELINES["Stable Diffusion 1.x"]


@pytest.fixture(scope="module")
def pipeline(case):
    return case.pipeline()


@pytest.fixture(scope="module")
def baseline(case, pipeline):
    return case.run(pipeline, num_inference_steps=STEPS)


def traces(pipeline):
    """What a method could leave behind."""
    network = pipeline.unet
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules()]
    return set(vars(network)), set(vars(pipeline.scheduler)) - {"step"}, sum(hooks)


@pytest.mark.parametrize(("conservative", "strong"), PEERS.values(), ids=PEERS)
def test_settings_skip_nothing_or_alike_in_every_run_and_are_removed(
    case, pipeline, baseline, conservative, strong
):
    before = traces(pipeline)
    with conservative.function(pipeline) as skipping:
        assert torch.equal(case.run(pipeline, num_inference_steps=STEPS), baseline)
    assert skipping.steps == ["computed"] * STEPS
    with strong.on(pipeline):
        first = case.run(pipeline, num_inference_steps=STEPS)
        again = case.run(pipeline, num_inference_steps=STEPS)
    assert torch.equal(first, again) and not torch.equal(first, baseline)
    assert torch.isfinite(first).all()
    assert traces(pipeline) == before and "step" not in vars(pipeline.scheduler)
    assert torch.equal(case.run(pipeline, num_inference_steps=STEPS), baseline)


def test_fbcache_skips_all_blocks_but_the_first(case, pipeline):
    calls = []
    first, last = pipeline.unet.down_blocks[0], pipeline.unet.mid_block
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append(m)) for m in (first, last)]
    with PEERS["fbcache"][1].function(pipeline) as skipping:
        case.run(pipeline, num_inference_steps=STEPS)
    [hook.remove() for hook in hooks]
    computed = skipping.steps.count("computed")
    assert computed < STEPS and set(skipping.steps) == {"computed", "first block"}
    assert sum(m is first for m in calls) == STEPS and sum(m is last for m in calls) == computed


def test_two_calls_per_step_follow_one_decision():
    case = PIPELINES["Wan 2.1, 2.2 (video)"]
    pipeline = case.pipeline()
    calls = []
    count = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["timestep"]), with_kwargs=True
    )
    with taylorseer.method(interval=3).function(pipeline) as skipping:
        case.run(pipeline, num_inference_steps=STEPS)
    count.remove()
    assert skipping.steps == ["computed"] * 3 + ["network", "network", "computed"] * 3
    assert len(calls) == 2 * STEPS


def test_a_run_begins_anew_after_one_that_was_interrupted(case, pipeline):
    with Skipping(pipeline, lambda: taylorseer.TaylorSeer(1, 2)) as skipping:
        first = case.run(pipeline, num_inference_steps=STEPS)
        for step in (0, 5):
            with pytest.raises(KeyboardInterrupt):
                case.run(
                    pipeline,
                    num_inference_steps=STEPS,
                    generator=torch.Generator().manual_seed(9),
                    callback_on_step_end=interrupt_at(step),
                )
            assert torch.equal(case.run(pipeline, num_inference_steps=STEPS), first)
    assert skipping.steps.count("computed") == 7


def interrupt_at(number):
    def callback(pipeline, step, timestep, kwargs):
        if step == number:
            raise KeyboardInterrupt
        return kwargs

    return callback


def test_wrong_options_and_models_say_what_to_write(pipeline):
    with pytest.raises(ToMeError, match="interval must be at least 1"):
        zeus.method(0)
    with pytest.raises(ToMeError, match="pass the pipeline"):
        zeus.method(2).function(pipeline.unet)
    wan = PIPELINES["Wan 2.1, 2.2 (video)"].pipeline()
    with pytest.raises(ToMeError, match="FirstBlockCacheConfig"), fbcache.method(1).function(wan):
        pass
    assert "forward" not in vars(wan.transformer)


# --- operations -----------------------------------------------------------------------------------


def test_shares_of_operations_are_those_of_the_record(monkeypatch, tmp_path):
    """Of the inner regions, of the first block, and of the branch that DeepCache computes."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    bench = importlib.import_module("step_caching_peers").Bench(["a"], tmp_path)
    record = json.loads((folder / "data" / "step_caching_peers.json").read_text())
    assert bench.left == pytest.approx(record["settings"]["left_if_skipped"])
