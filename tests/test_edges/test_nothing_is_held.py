# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Nothing is held that nobody needs: caches, inputs, models."""

import contextlib
import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from denoise import denoise, denoising
from edge_pipelines import KEEPERS, TIMES, generate, sd15_pipeline, sd15_unet
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_tome, get_handle
from mmagic_tome.cache.skip import CachePatch
from mmagic_tome.patch import find_patch
from mmagic_tome.tome.state import TomePatch

APPLY = {
    **KEEPERS,
    "merging": partial(apply_tome, ratio=0.5),
    "block": partial(apply_tome, ratio=0.5, targets="block"),
}
each = pytest.mark.parametrize("apply", APPLY.values(), ids=APPLY)


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def context_of(network):
    """The thread's context of what is applied."""
    return (find_patch(network, CachePatch) or find_patch(network, TomePatch)).context


def tensors_kept(value, depth=8):
    """How many tensors are kept between the steps of a network; or are inside any other value."""
    if isinstance(value, torch.nn.Module):
        value = context_of(value).tracker.runs
    if isinstance(value, torch.Tensor):
        return 1
    if isinstance(value, type) or depth == 0:
        return 0
    if not isinstance(value, (list, tuple)):
        members = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        value = list(members.values())
    return sum(tensors_kept(one, depth - 1) for one in value)


@each
def test_caches_end_with_the_run(apply):
    case, pipeline = sd15_pipeline()
    apply(pipeline)
    during = []

    def watch(pipeline, step, time, kwargs):
        during.append(tensors_kept(pipeline.unet))
        return kwargs

    generate(case, pipeline, callback_on_step_end=watch)
    assert max(during) > 0 or apply in (APPLY["merging"], APPLY["block"])
    assert tensors_kept(pipeline.unet) == 0
    # Without a pipeline at the last step: only samples of the last latents, to tell the next run.
    apply(network := tiny_unet())
    denoise(network, tiny_inputs(), TIMES)
    # With a tolerance those of the last outputs, which predict its errors, too.
    assert tensors_kept(network) <= (10 if apply is APPLY["tolerance"] else 6)


@each
def test_caches_end_with_an_exception(apply, no_gc):
    network, seen, armed = tiny_unet(), [], False
    apply(network)

    def watch(module, args, kwargs):
        seen.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))
        if armed:
            raise MemoryError("out of memory")

    block = network.up_blocks[-1].attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(watch, with_kwargs=True)
    with contextlib.suppress(MemoryError):
        for step in denoising(network, tiny_inputs(), TIMES[:4]):
            armed = step.time < 950  # one of the next two may be skipped
        raise AssertionError
    context = context_of(network)
    assert tensors_kept(network) == 0 and not context.running
    assert not getattr(context, "plans", None) and not getattr(context, "pending", None)
    gc.collect()
    assert not any(reference() is not None for reference in seen)


@pytest.mark.parametrize("when", ["applied", "run", "removed"])
@each
def test_a_model_is_freed_without_the_garbage_collector(apply, when, no_gc):
    network = tiny_unet()
    handle = apply(network)
    if when != "applied":
        denoise(network, tiny_inputs(), TIMES[:1])
    if when == "removed":
        handle.remove()
    reference = weakref.ref(network)
    del network
    assert reference() is None
    assert not handle.active and handle.network is None
    assert "gone" in repr(handle) and handle.summary()


@pytest.mark.parametrize("name", ["both", "plans"])
def test_a_block_can_be_copied_and_pickled_alone(name):
    network = sd15_unet()
    APPLY[name](network)
    denoise(network, tiny_inputs(), TIMES[:1])
    plain = len(pickle.dumps(sd15_unet().mid_block))
    assert len(pickle.dumps(network.mid_block)) < 1.2 * plain
    block = copy.deepcopy(network.mid_block)
    assert not any(module is network for module in block.modules())


@each
def test_copies_in_the_middle_of_a_run_are_independent(apply):
    network, inputs, times = tiny_unet(), tiny_inputs(), TIMES[::3]
    baseline = denoise(network, inputs, times)
    apply(network)
    expected = denoise(network, inputs, times)
    list(denoising(network, inputs, times[:3]))
    for one in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        handle = get_handle(one)
        assert handle.active and type(one) is type(network) and tensors_kept(one) == 0
        assert torch.equal(denoise(one, inputs, times), expected)
        one.conv_in.weight.data.mul_(2)
        assert not torch.equal(denoise(one, inputs, times), expected)
        assert torch.equal(denoise(network, inputs, times), expected)
        one.conv_in.weight.data.div_(2)
        handle.remove()
        assert torch.equal(denoise(one, inputs, times), baseline)
    assert get_handle(network).active
    list(denoising(network, inputs, times[:3]))
    get_handle(network).reset_stats()
    assert tensors_kept(network) > 0 or apply in (APPLY["merging"], APPLY["block"])
    get_handle(network).reset_run()
    assert tensors_kept(network) == 0
