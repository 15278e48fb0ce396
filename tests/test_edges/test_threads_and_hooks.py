# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Threads, replicas and hooks of others."""

import threading

import pytest
import torch
from edge_pipelines import SETTINGS
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_cache, apply_tome


class Paused:
    """A call of a network in another thread, stopped in front of one of its blocks."""

    def __init__(self, network, module):
        self.inside, self.go = threading.Event(), threading.Event()
        self.result = None
        self.network = network
        self.thread = threading.Thread(target=self.work)
        self.hook = module.register_forward_pre_hook(self.pause, with_kwargs=True, prepend=True)

    def pause(self, module, args, kwargs):
        if threading.current_thread() is self.thread:
            self.inside.set()
            self.go.wait(60)

    def work(self):
        with torch.no_grad():
            self.result = self.network(**tiny_inputs()).sample

    def __enter__(self):
        self.thread.start()
        self.inside.wait(60)
        return self

    def __exit__(self, *exc):
        self.go.set()
        self.thread.join()
        self.hook.remove()


@pytest.mark.parametrize("what", ["reset_run", "reset_stats", "ratio", "disabled", "call"])
@pytest.mark.parametrize("options", [{}, dict(plan_interval=2), dict(targets="block")])
def test_another_thread_is_not_disturbed(options, what):
    network = tiny_unet()
    handle = apply_tome(network, ratio=0.5, **options)
    with torch.no_grad():
        expected = network(**tiny_inputs()).sample
    handle.reset_run()
    block = network.mid_block.attentions[0].transformer_blocks[0]
    with Paused(network, block) as other:
        if what == "disabled":
            with handle.disabled():
                other.__exit__()
        elif what == "ratio":
            handle.ratio = 0.25
        elif what == "call":
            with torch.no_grad():
                network(**tiny_inputs(size=24))
        else:
            getattr(handle, what)()
        other.go.set()
        other.thread.join()
    assert torch.equal(other.result, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_replicas_run_their_own_weights(setting):
    """What ``nn.DataParallel`` makes for each device."""
    network = tiny_unet()
    apply_cache(network, setting)
    replica = network._replicate_for_data_parallel()
    replica.conv_out = torch.nn.Conv2d(16, 4, 3, padding=1)
    inputs = tiny_inputs()
    with torch.no_grad():
        for time in (951, 901, 851, 801):
            own = replica(**{**inputs, "timestep": torch.tensor(time)}).sample
            assert own.shape == inputs["sample"].shape
        baseline = tiny_unet()
        baseline.conv_out = replica.conv_out
        for time in (951,):
            first = replica(**{**inputs, "timestep": torch.tensor(time)}).sample
            wanted = baseline(**{**inputs, "timestep": torch.tensor(time)}).sample
            assert torch.equal(first, wanted)


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
        with torch.no_grad():
            network(**tiny_inputs())
    if when != "before":
        watch()
    with torch.no_grad():
        network(**tiny_inputs())
    assert seen == [256, 256]
    assert handle.stats()[0]["kept"] == 128


def test_a_cache_places_no_hooks_and_shows_no_merging():
    network = tiny_unet()
    handle = apply_cache(network, "balanced")
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()
    )
    assert hooks <= 2
    assert "removed" not in handle.summary() and "tokens" not in handle.summary()
    assert "network" in handle.summary()


def test_both_at_once_in_either_order():
    images = []
    for order in ("tome first", "cache first"):
        network = tiny_unet()
        applied = {}
        for technique in sorted(("tome", "cache"), reverse=order == "tome first"):
            if technique == "tome":
                applied["tome"] = apply_tome(network, ratio=0.5)
            else:
                applied["cache"] = apply_cache(network, "fast")
        inputs = tiny_inputs()
        with torch.no_grad():
            for time in range(951, 0, -50):
                output = network(**{**inputs, "timestep": torch.tensor(time)}).sample
                inputs["sample"] = inputs["sample"] - 0.05 * output
        images.append(inputs["sample"])
        assert applied["tome"].stats()[0]["calls"] == applied["cache"].stats()[0]["computed"]
        assert "skipped" not in applied["tome"].summary()
        applied["tome"].remove()
        assert applied["cache"].active and not applied["tome"].active
        applied["cache"].remove()
        with torch.no_grad():
            assert torch.equal(network(**tiny_inputs()).sample, tiny_unet()(**tiny_inputs()).sample)
    assert torch.equal(*images)


@pytest.mark.parametrize("first, then", [(0.5, "schedule"), ("schedule", 0.5)])
def test_a_schedule_that_another_thread_assigns(first, then):
    """A call ends by the options that it began with."""
    ratios = {0.5: 0.5, "schedule": dict(base=0.5, timestep=dict(kind="linear"))}
    network = tiny_unet()
    handle = apply_tome(network, ratio=ratios[first])
    with torch.no_grad():
        expected = network(**tiny_inputs()).sample
    block = network.mid_block.attentions[0].transformer_blocks[0]
    with Paused(network, block) as other:
        handle.ratio = ratios[then]
        other.go.set()
        other.thread.join()
    assert torch.equal(other.result, expected)


def test_a_class_that_was_derived_later_stays():
    """As those of ``fully_shard`` and ``parametrize``."""
    network = tiny_unet()
    handle = apply_cache(network, "fast")
    with torch.no_grad():
        expected = tiny_unet()(**tiny_inputs()).sample
    network.__class__ = type("Sharded", (type(network),), {})
    handle.remove()
    assert type(network).__name__ == "Sharded"
    with torch.no_grad():
        assert torch.equal(network(**tiny_inputs()).sample, expected)
    handle = apply_cache(network, "fast")
    with torch.no_grad():
        network(**tiny_inputs())
    assert handle.active and handle.stats()[0]["computed"] == 1


def test_nothing_that_finds_runs_is_compiled():
    """It would be compiled again as runs come and go, and break at every number it reads."""
    import torch._dynamo

    torch._dynamo.reset()
    files = set()

    def backend(graph, inputs):
        files.update(str(node.stack_trace) for node in graph.graph.nodes)
        return graph.forward

    network = tiny_unet(levels=1)
    handle = apply_cache(network, region="network", timestep_range=(0, 1))
    compiled = torch.compile(network, backend=backend)
    inputs = tiny_inputs()
    with torch.no_grad():
        for time in range(951, 400, -100):
            output = compiled(**{**inputs, "timestep": torch.tensor(time)}).sample
            inputs["sample"] = inputs["sample"] - 0.05 * output
    assert handle.stats()[0]["skipped"] == 2
    assert any("unet_2d_condition" in one for one in files)
    assert not any("runs.py" in one for one in files)
