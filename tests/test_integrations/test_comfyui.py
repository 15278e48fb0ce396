# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The ComfyUI node: on a stand-in with its calling convention, always; on its own engine, where
there is one (``COMFYUI_PATH=folder of ComfyUI``, or its package ``comfy`` on the path)."""

import importlib.util
import logging
import shutil
import sys
from pathlib import Path

import comfy_engine
import pytest
import torch
from comfy_standin import Flow, Patcher, Sampling, sample
from tiny import error

import integrations.comfyui
from integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from integrations.comfyui.nodes import TokenMerging
from mmagic_tome import ToMeError

NODE = NODE_CLASS_MAPPINGS["MMagicToMe"]
STEPS = 20


def sigmas(steps=STEPS):
    """Karras' schedule from 14.6 to 0.03, and 0."""
    ramp = torch.linspace(0, 1, steps)
    low, high = 0.03 ** (1 / 7), 14.6 ** (1 / 7)
    return torch.cat([(high + ramp * (low - high)) ** 7, torch.zeros(1)])


def accelerated(model, tolerance=0.02, ratio=0.0):
    (found,) = NODE().apply(model, tolerance, ratio)
    return found


def steps_of(model):
    return model.model_options["model_function_wrapper"].calls.handle.steps


def test_the_node_is_described_as_comfyui_wants_it():
    assert {*NODE_DISPLAY_NAME_MAPPINGS} == {*NODE_CLASS_MAPPINGS}
    inputs = NODE.INPUT_TYPES()["required"]
    assert [*inputs] == ["model", "tolerance", "ratio"] and inputs["model"] == ("MODEL",)
    assert NODE.RETURN_TYPES == ("MODEL",) and callable(getattr(NODE(), NODE.FUNCTION))
    for name in ("tolerance", "ratio"):
        kind, options = inputs[name]
        assert kind == "FLOAT" and options["min"] == 0 <= options["default"] <= options["max"]


def test_a_copy_of_the_folder_is_a_custom_node(tmp_path, monkeypatch):
    folder = tmp_path / "custom_nodes" / "mmagic_tome"
    shutil.copytree(Path(integrations.comfyui.__file__).parent, folder)
    name = str(folder).replace(".", "_x_")  # ComfyUI's name for the module: its path
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert [*module.NODE_CLASS_MAPPINGS] == ["MMagicToMe"]
    monkeypatch.delitem(sys.modules, f"{name}.nodes")


# --- step caching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False], ids=["one call", "two calls"])
@pytest.mark.parametrize("sampling", [Sampling, Flow])
def test_steps_are_skipped_within_the_tolerance(sampling, batched):
    schedule = sigmas() if sampling is Sampling else torch.linspace(0.97, 0, STEPS + 1)
    errors, computed = [], []
    for tolerance in (0.005, 0.02, 0.1):
        model = Patcher(sampling())
        wanted = sample(model, schedule, batched=batched)
        model.model.calls = 0
        fast = accelerated(model, tolerance)
        errors.append(error(sample(fast, schedule, batched=batched), wanted))
        assert errors[-1] <= 2 * tolerance
        steps = steps_of(fast)
        computed.append(steps.count("computed"))
        assert len(steps) == STEPS and {*steps} <= {"computed", "network"}
        assert steps[0] == steps[-1] == "computed"
        assert fast.model.calls == computed[-1] * (1 if batched else 2)
    assert computed == sorted(computed, reverse=True) and computed[-1] < 0.75 * STEPS


def test_without_skips_it_is_the_baseline_and_the_original_stays_as_it_is():
    model = Patcher(Sampling())
    wanted = sample(model, sigmas())
    fast = accelerated(model, 0.1, 0.5)
    assert model.model_options == {"transformer_options": {}}
    assert fast is not model and fast.model is model.model
    assert torch.equal(sample(accelerated(model, 1e-9), sigmas()), wanted)
    assert "model_function_wrapper" not in accelerated(model, 0.0).model_options


def test_a_run_does_not_leak_into_the_next():
    fast = accelerated(Patcher(Sampling()), 0.05)
    first = sample(fast, sigmas(), seed=1)
    sample(fast, sigmas(), seed=2)
    sample(fast, sigmas(12), seed=1)
    assert torch.equal(sample(fast, sigmas(), seed=1), first)

    class Stop(Exception):
        pass

    def interrupt(step, x):
        if step == 6:
            raise Stop
        return x

    with pytest.raises(Stop):
        sample(fast, sigmas(), seed=3, on_step=interrupt)
    assert torch.equal(sample(fast, sigmas(), seed=1), first)


@pytest.mark.parametrize("end", [0.0, 0.001, 0.02], ids=["zero", "UniPC", "noise is left"])
def test_the_last_step_is_computed_wherever_it_ends(end):
    schedule = sigmas()
    schedule[-1] = end
    fast = accelerated(Patcher(Sampling()), 0.3)
    sample(fast, schedule)
    assert len(steps_of(fast)) == STEPS and steps_of(fast)[-1] == "computed"
    assert "network" in steps_of(fast)


def test_a_wrapper_that_was_there_runs_inside():
    model, seen = Patcher(Sampling()).clone(), []

    def wrapper(apply_model, args):
        seen.append(args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    fast = accelerated(model, 0.05)
    sample(fast, sigmas())
    assert len(seen) == steps_of(fast).count("computed") < STEPS


def test_the_end_of_a_run_is_logged(caplog):
    with caplog.at_level(logging.INFO, "mmagic_tome"):
        fast = accelerated(Patcher(Sampling()), 0.05)
        sample(fast, sigmas())
    skipped = sum(step != "computed" for step in steps_of(fast))
    assert f"skipped {skipped} of {STEPS} steps" in caplog.text


def test_an_old_comfyui_skips_nothing_and_says_so(caplog):
    model = Patcher(Sampling())
    wanted = sample(model, sigmas(), sigmas_told=False)
    found = sample(accelerated(model, 0.1), sigmas(), sigmas_told=False)
    assert torch.equal(found, wanted) and caplog.text.count("sample_sigmas") == 1


# --- token merging --------------------------------------------------------------------------------


def test_tokens_are_merged_and_copied_back():
    model = Patcher(Sampling())
    wanted = sample(model, sigmas())
    assert model.model.tokens == 64
    fast = accelerated(model, 0.0, 0.5)
    found = sample(fast, sigmas())
    assert fast.model.tokens == 32 and 0 < error(found, wanted) < 0.1
    assert torch.equal(sample(fast, sigmas()), found), "the same seed returns the same image"
    both = accelerated(model, 0.05, 0.5)
    sample(both, sigmas())
    assert both.model.tokens == 32 and steps_of(both).count("network") > 0


def test_only_the_finest_grid_is_merged():
    merging = TokenMerging(0.5)
    for tokens, block, kept in ((64, ("input", 1), 32), (16, ("input", 4), 16), (64, None, 32)):
        x = torch.randn(2, tokens, 8)
        options = {"original_shape": [2, 4, 16, 16], "block": block, "sigmas": torch.ones(1)}
        merged, keys, values = merging.before(x, x, x, options)
        assert merged.shape == keys.shape == values.shape == (2, kept, 8)
        assert merging.after(merged, options).shape == x.shape
    # Odd grids are rounded up from level to level; context of another length is left alone.
    odd = {"original_shape": [1, 4, 15, 9], "block": ("input", 1)}
    x = torch.randn(1, 8 * 5, 8)
    merging = TokenMerging(0.5)
    assert merging.before(x, x, x, odd)[0].shape[1] == 20
    text = torch.randn(1, 7, 8)
    assert merging.before(x, text, text, odd) == (x, text, text)
    assert merging.after(x, odd) is x


@pytest.mark.parametrize(
    ("unet", "tolerance", "ratio", "message"),
    [
        (False, 0.02, 0.5, "is no UNet.*write ratio=0"),
        (True, 0.02, 0.8, "write ratio=0.5"),
        (True, 1.5, 0.0, "tolerance"),
    ],
)
def test_what_cannot_be_done_is_an_error(unet, tolerance, ratio, message):
    with pytest.raises(ToMeError, match=message):
        accelerated(Patcher(Sampling(), unet), tolerance, ratio)


# --- ComfyUI's own engine -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfy():
    return comfy_engine.engine()


@pytest.fixture(scope="module")
def generate(comfy):
    """Sample the latent of the demo model with a MODEL, in ComfyUI."""
    apple, nothing = comfy_engine.texts("red apple", "")
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))

    def run(model, sampler="euler", steps=12):
        how = (steps, 3.0, sampler, "sgm_uniform", apple, nothing)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, *how, torch.zeros_like(noise), seed=0, disable_pbar=True
            )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "euler_ancestral"])
def test_comfyui_itself_skips_steps_of_a_trained_model(comfy, generate, sampler):
    model = comfy_engine.demo_model(comfy)
    wanted = generate(model, sampler)
    fast = accelerated(model, 0.05)
    found = generate(fast, sampler)
    assert wanted.isfinite().all() and error(found, wanted) <= 2 * 0.05
    steps = steps_of(fast)
    assert len(steps) == 12 and steps[-1] == "computed"
    assert ("network" in steps) == (sampler != "euler_ancestral"), "noise cannot be foreseen"
    assert torch.equal(generate(model, sampler), wanted), "the original is as it was"


@pytest.mark.slow
def test_comfyui_itself_merges_tokens(comfy, generate):
    model = comfy_engine.demo_model(comfy)
    wanted = generate(model)
    (merging,) = NODE().apply(model, 0.0, 0.5)
    found = generate(merging)
    patches = merging.model_options["transformer_options"]["patches"]["attn1_patch"]
    assert patches[0].__self__.tokens == (1024, 512)
    assert 0 < error(found, wanted) < 0.2
    assert torch.equal(generate(model), wanted)
