# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Nothing is held that nobody needs: caches, inputs, models."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from edge_pipelines import SETTINGS, generate, sd15_pipeline, sd15_unet, skips
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_cache, apply_tome, get_handle

KEPT = [
    (apply_cache, dict(config="quality")),
    (apply_cache, dict(config="balanced")),
    (apply_cache, dict(config="fast")),
    (apply_tome, dict(ratio=0.5)),
    (apply_tome, dict(ratio=0.5, targets=["attn", "mlp"], plan_interval=2, residual=True)),
    (apply_tome, dict(ratio=0.5, targets="block")),
]
IDS = ["quality", "balanced", "fast", "merging", "residual", "block"]


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors_kept(handle):
    """How many tensors the state between steps refers to."""
    found = 0
    for part in handle._parts:
        context = part.patch.context
        for run in context.tracker.runs if context.tracker else ():
            found += sum(x is not None for x in (run.input, run.previous))
            for branch in run.branches.values():
                found += len(branch.outputs) + _tensors(branch.state)
    return found


def _tensors(value, depth=6):
    if isinstance(value, torch.Tensor):
        return 1
    if depth == 0:
        return 0
    if isinstance(value, dict):
        return sum(_tensors(item, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensors(item, depth - 1) for item in value)
    members = getattr(value, "__dict__", {})
    return sum(_tensors(item, depth - 1) for item in members.values())


@pytest.mark.parametrize("apply, options", KEPT, ids=IDS)
def test_caches_end_with_the_run_of_a_pipeline(apply, options):
    case, pipeline = sd15_pipeline()
    handle = apply(pipeline, **options)
    during = []

    def watch(pipeline, step, time, kwargs):
        during.append(tensors_kept(handle))
        return kwargs

    generate(case, pipeline, callback_on_step_end=watch)
    if apply is apply_cache or options.get("residual"):
        assert max(during) > 0
    assert tensors_kept(handle) == 0


@pytest.mark.parametrize("apply, options", KEPT, ids=IDS)
def test_caches_end_with_the_last_step_without_a_pipeline(apply, options):
    network = tiny_unet()
    handle = apply(network, **options)
    inputs = tiny_inputs()
    with torch.no_grad():
        for time in range(951, 0, -50):
            output = network(**{**inputs, "timestep": torch.tensor(time)}).sample
            inputs["sample"] = inputs["sample"] - 0.05 * output
    # Only samples of the last latents, to tell the next run.
    assert tensors_kept(handle) <= 4


@pytest.mark.parametrize("apply, options", KEPT, ids=IDS)
def test_caches_end_with_an_exception(apply, options, no_gc):
    network = tiny_unet()
    handle = apply(network, **options)
    block = network.up_blocks[-1].attentions[0].transformer_blocks[0]
    inputs, seen = tiny_inputs(), []

    def watch(module, args, kwargs):
        seen.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))
        if armed:
            raise MemoryError("out of memory")

    armed = False
    block.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        for time in (951, 901):
            output = network(**{**inputs, "timestep": torch.tensor(time)}).sample
            inputs["sample"] = inputs["sample"] - 0.05 * output
        armed = True
        with contextlib.suppress(MemoryError):
            for time in (851, 801):  # one of them may be skipped
                network(**{**inputs, "timestep": torch.tensor(time)})
    assert tensors_kept(handle) == 0
    context = handle._parts[0].patch.context
    assert not context.running
    assert not getattr(context, "plans", None) and not getattr(context, "pending", None)
    gc.collect()
    assert not any(reference() is not None for reference in seen)


@pytest.mark.parametrize("when", ["applied", "run", "removed"])
@pytest.mark.parametrize("apply, options", KEPT, ids=IDS)
def test_a_model_is_freed_without_the_garbage_collector(apply, options, when, no_gc):
    network = tiny_unet()
    handle = apply(network, **options)
    if when != "applied":
        with torch.no_grad():
            network(**tiny_inputs())
    if when == "removed":
        handle.remove()
    reference = weakref.ref(network)
    del network
    assert reference() is None
    assert not handle.active
    assert handle.network is None
    assert "gone" in repr(handle)
    assert handle.summary()


@pytest.mark.parametrize("apply, options", KEPT, ids=IDS)
def test_a_block_can_be_copied_and_pickled_alone(apply, options):
    network = sd15_unet()
    handle = apply(network, **options)
    with torch.no_grad():
        network(**tiny_inputs())
    plain = len(pickle.dumps(sd15_unet().mid_block))
    assert len(pickle.dumps(network.mid_block)) < 1.2 * plain
    block = copy.deepcopy(network.mid_block)
    assert not any(module is network for module in block.modules())
    assert handle.active


@pytest.mark.parametrize("apply, options", KEPT, ids=IDS)
def test_copies_in_the_middle_of_a_run_are_independent(apply, options):
    network = tiny_unet()
    apply(network, **options)
    inputs = tiny_inputs()
    with torch.no_grad():
        for time in (951, 901, 851):
            output = network(**{**inputs, "timestep": torch.tensor(time)}).sample
            inputs["sample"] = inputs["sample"] - 0.05 * output
    twin = copy.deepcopy(network)
    stored = pickle.loads(pickle.dumps(network))
    for one in (twin, stored):
        own = get_handle(one)
        assert own.active and tensors_kept(own) == 0
        own.remove()
        with torch.no_grad():
            assert torch.equal(one(**inputs).sample, tiny_unet()(**inputs).sample)
    assert get_handle(network).active


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("region", ["network", "inner"])
def test_callers_may_write_into_what_they_get(region, order):
    def outputs(write):
        network = tiny_unet()
        apply_cache(network, region=region, interval=3, order=order, timestep_range=(0, 1))
        inputs, found = tiny_inputs(), []
        with torch.no_grad():
            for time in range(951, 0, -100):
                output = network(**{**inputs, "timestep": torch.tensor(time)}).sample
                found.append(output.clone())
                inputs["sample"] = inputs["sample"] - 0.05 * output
                if write:
                    output.zero_()
        return found

    assert all(torch.equal(a, b) for a, b in zip(outputs(False), outputs(True)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_reset_run_frees_and_reset_stats_keeps(setting):
    network = tiny_unet()
    handle = apply_cache(network, setting)
    inputs = tiny_inputs()
    with torch.no_grad():
        for time in (951, 901, 851):
            network(**{**inputs, "timestep": torch.tensor(time)})
    kept, stats = tensors_kept(handle), handle.stats()
    assert kept > 0
    handle.reset_stats()
    assert tensors_kept(handle) == kept
    assert set(skips(handle).values()) == {0}
    handle.reset_run()
    assert tensors_kept(handle) == 0
    assert stats != handle.stats()


def test_training_keeps_the_plans_of_one_step():
    network = tiny_unet()
    handle = apply_tome(network, ratio=0.5, plan_interval=4)
    for _ in range(5):
        network(**tiny_inputs()).sample.sum().backward()
    assert len(handle._parts[0].patch.context.tracker.runs) == 1
