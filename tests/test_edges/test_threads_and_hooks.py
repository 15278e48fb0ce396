# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Threads, replicas and hooks of others."""

import contextlib
import threading

import pytest
import torch
from denoise import denoise
from edge_pipelines import TIMES
from fixed_steps import FIXED
from tiny import run, tiny_inputs, tiny_unet

from mmagic_tome import apply_cache, apply_tome

BY_TIME = dict(base=0.5, timestep=dict(points=[(1, 1), (0, 0)]))


def interrupted(network, action):
    """The output of a call in another thread, which stops in the middle while ``action()`` runs,
    and goes on inside the context that it returns, if it does."""
    inside, go, found = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: found.append(run(network)))

    def pause(module, args, kwargs):
        if threading.current_thread() is thread:
            inside.set()
            assert go.wait(60)

    block = network.mid_block.attentions[0].transformer_blocks[0]
    with block.register_forward_pre_hook(pause, with_kwargs=True, prepend=True):
        thread.start()
        assert inside.wait(60)
        context = action()
        with context if hasattr(context, "__enter__") else contextlib.nullcontext():
            go.set()
            thread.join()
    return found[0]


ACTIONS = {
    "reset_run": lambda network, handle: handle.reset_run(),
    "ratio": lambda network, handle: setattr(handle, "ratio", 0.25),
    # A call ends by the options that it began with.
    "ratio by time": lambda network, handle: setattr(handle, "ratio", BY_TIME),
    "call": lambda network, handle: run(network, **tiny_inputs(size=24)),
    "disabled": lambda network, handle: handle.disabled(),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "options", [{}, dict(plan_interval=2), dict(targets="block"), dict(ratio=BY_TIME)], ids=str
)
def test_another_thread_is_not_disturbed(options, action):
    network = tiny_unet()
    handle = apply_tome(network, **{"ratio": 0.5, **options})
    expected = run(network)
    handle.reset_run()
    found = interrupted(network, lambda: ACTIONS[action](network, handle))
    assert torch.equal(found, expected)


def test_replicas_run_their_own_weights():
    """What ``nn.DataParallel`` makes for each device."""
    network, baseline = tiny_unet(), tiny_unet()
    apply_cache(network, FIXED["both"])
    replica = network._replicate_for_data_parallel()
    replica.conv_out = baseline.conv_out = torch.nn.Conv2d(16, 4, 3, padding=1)
    denoise(replica, tiny_inputs(), TIMES)
    assert torch.equal(run(replica, **tiny_inputs(seed=1)), run(baseline, **tiny_inputs(seed=1)))


@pytest.mark.parametrize("targets", ["attn", "mlp", "block"])
@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_hooks_of_users_see_unmerged_tokens(targets, when):
    network = tiny_unet()
    block = network.down_blocks[0].attentions[0].transformer_blocks[0]
    module = {"attn": block.attn1, "mlp": block.ff, "block": block}[targets]
    seen = []

    def watch():
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((args or list(kwargs.values()))[0].shape[1]),
            with_kwargs=True,
        )
        module.register_forward_hook(lambda m, args, output: seen.append(output.shape[1]))

    if when == "before":
        watch()
    handle = apply_tome(network, ratio=0.5, targets=targets)
    if when == "between":
        run(network)
    if when != "before":
        watch()
    run(network)
    assert seen == [256, 256]
    assert handle.stats()[0]["kept"] == 128
