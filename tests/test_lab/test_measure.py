# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Seconds, rounds, intervals, memory and FLOPs."""

import gc
import time
from collections import Counter

import numpy as np
import pytest
import torch
from denoise import STEPS, denoise
from tiny import tiny_inputs, tiny_unet
from torch import nn

from mmagic_tome import ToMeError, apply_cache, apply_tome
from mmagic_tome.lab import measure
from mmagic_tome.lab.measure import (
    FEWEST_ROUNDS,
    Interval,
    StepMarks,
    balanced_order,
    count_flops,
    interleaved,
    interval,
    peak_memory,
    ratios,
    timed,
)

# --- seconds --------------------------------------------------------------------------------------


def test_time_is_taken_between_synchronizations(monkeypatch):
    done = []
    monkeypatch.setattr(measure, "synchronize", lambda device: done.append("synchronize"))
    now = iter([1.0, 3.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: done.append("now") or next(now))
    assert timed(lambda: done.append("work") or 7, "cpu") == (2.5, 7)
    assert done == ["synchronize", "now", "work", "synchronize", "now"]


def test_marks_are_around_each_call_and_gone_afterwards():
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    steps = []
    # Of two marks on one module the one that came last is outermost.
    with StepMarks(module, "cpu", on_step=lambda: steps.append(1)) as marks:
        for _ in range(2):
            module(torch.ones(1, 2))
        with StepMarks(module, "cpu") as outer:
            module(torch.ones(1, 2))
        with pytest.raises(RuntimeError):
            module(torch.ones(1, 3))
    module(torch.ones(1, 2))
    assert len(marks.seconds()) == len(steps) == 3 and min(marks.seconds()) >= 0.02
    assert [marks.seconds()[2] < one for one in outer.seconds()] == [True]
    assert type(module) is nn.Linear


@pytest.mark.parametrize("marks_first", [False, True])
def test_steps_that_step_caching_skips_are_marked_too(marks_first):
    unet, inputs = tiny_unet(), tiny_inputs()
    plain = denoise(unet, inputs)
    with apply_cache(unet, region="network") as handle:
        cached = denoise(unet, inputs)
        (region,) = handle.stats()
    marks = StepMarks(unet, "cpu")
    if marks_first:
        with marks, apply_cache(unet, region="network"):
            assert torch.equal(denoise(unet, inputs), cached)
    else:
        with apply_cache(unet, region="network"), marks:
            assert torch.equal(denoise(unet, inputs), cached)
    seconds = marks.seconds()
    assert len(seconds) == len(STEPS) and region["skipped"] > 0
    # A skipped step takes no time next to a computed one.
    assert sum(s < max(seconds) / 4 for s in seconds) >= region["skipped"]
    assert torch.equal(denoise(unet, inputs), plain)


# --- rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("first", [0, 1])
def test_every_method_runs_after_every_other_equally_often(count, first):
    names = [f"method {number}" for number in range(count)]
    rounds = count * (1 + count % 2)
    neighbours, places = Counter(), Counter()
    for turn in range(first, first + rounds):
        order = balanced_order(names, turn)
        assert sorted(order) == names
        neighbours.update(zip(order, order[1:]))
        places.update(enumerate(order))
    assert set(neighbours) == {(a, b) for a in names for b in names if a != b}
    assert set(neighbours.values()) <= {1 + count % 2}
    assert set(places.values()) == {1 + count % 2}


def test_rounds_go_on():
    ran = []
    calls = {name: (lambda name=name: ran.append(name) or len(ran)) for name in "abc"}
    found = list(interleaved(calls, range(4, 6)))
    assert ran == balanced_order("abc", 4) + balanced_order("abc", 5)
    assert found == [(4 + n // 3, name, n + 1) for n, name in enumerate(ran)]


def test_garbage_is_collected_before_a_call_and_old_objects_are_left_out():
    class Node:
        alive = 0

        def __init__(self):
            self.me = self  # only the collector frees it
            Node.alive += 1

        def __del__(self):
            Node.alive -= 1

    gc.unfreeze()
    alive = []
    for _ in interleaved({"a": lambda: alive.append(Node.alive) or (Node() and None)}, range(3)):
        assert gc.get_freeze_count() > 0
    assert alive == [0, 0, 0] and gc.get_freeze_count() == 0
    gc.freeze()
    list(interleaved({"a": int}, range(1)))
    assert gc.get_freeze_count() > 0


# --- intervals ------------------------------------------------------------------------------------


def test_interval_of_few_values():
    few = interval([1.0, 2.0, 4.0])
    assert (few.low, few.high, few.coverage) == (1, 4, 0.75)
    assert interval([3.0]) == Interval(3, 3, 3, 0, 1)
    with pytest.raises(ToMeError, match="run at least one round"):
        interval([])


@pytest.mark.parametrize("count", range(1, 41))
def test_interval_is_the_one_of_scipys_quantile_test(count):
    from scipy.stats import quantile_test

    values = list(np.random.default_rng(count).normal(size=count))
    theirs = quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    ours = interval(values)
    if count < 6:
        assert np.isnan(theirs.low) and np.isnan(theirs.high) and ours.coverage < 0.95
    else:
        assert (ours.low, ours.high) == (theirs.low, theirs.high) and ours.coverage >= 0.95


@pytest.mark.parametrize(
    ("speedups", "text"),
    [
        ([1.42, 1.61, 1.45, 1.43, 1.6, 1.44], "1.44x (1.42-1.61)"),
        ([0.97, 1.12, 1.05, 1.01, 1.04, 1.1], "~1.04x (0.97-1.12)"),
        ([5.0] * (FEWEST_ROUNDS - 1), "~5.00x (5.00-5.00)"),
        ([5.0] * FEWEST_ROUNDS, "5.00x (5.00-5.00)"),
        ([0.91], "~0.91x (one pair gives no interval)"),
        (ratios([2.0] * 6, [2.0] * 6), "1.00x"),
        # The machine slows down for a while; the ratio within rounds does not change.
        (ratios([10.0, 20.0, 40.0] * 2, [6.0, 12.0, 24.0] * 2), "1.67x (1.67-1.67)"),
    ],
)
def test_text_marks_what_is_not_certain(speedups, text):
    assert interval(speedups).text() == text


# --- memory ---------------------------------------------------------------------------------------

MIB = 2**18  # float32 values


def test_peak_of_tensors_is_exact_and_the_same_every_time():
    def work():
        a = torch.zeros(MIB)
        b = torch.cat([a, a])  # 1 + 2
        del a
        c = b.clone()  # 2 + 2: the peak
        del b
        return c

    assert {peak_memory(work, "cpu") for _ in range(3)} == {4 * 2**20}


def test_tensors_that_existed_before_do_not_count_not_even_where_a_call_frees_them():
    kept = [torch.zeros(8 * MIB)]

    def work():
        kept.clear()
        kept.append(torch.zeros(2 * MIB))
        return torch.zeros(MIB)

    assert [peak_memory(work, "cpu") for _ in range(3)] == [3 * 2**20] * 3


# --- floating-point operations --------------------------------------------------------------------


class Net(nn.Module):
    """Convolution, self-attention and feed-forward over 16x16 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.feed_forward = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(2, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


def test_flops_of_a_small_network_are_those_counted_by_hand():
    net, batch, tokens = Net(), 2, 16 * 16
    multiply_adds = 3 * 9 * 32 + 32 * 96 + 32 * 32 + 2 * 32 * 128  # per token
    multiply_adds += 2 * 32 * tokens  # scores and weighted means
    expected = 2 * batch * tokens * multiply_adds
    x = torch.randn(batch, 3, 16, 16)
    assert count_flops(lambda: net(x)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_merging_costs_the_same_in_8_bits_in_full_and_in_tomesd(ratio, monkeypatch):
    tomesd = pytest.importorskip("tomesd")
    from mmagic_tome.merging import int8

    unet, x = tiny_unet(), tiny_inputs()
    inputs = (x["sample"], x["timestep"], x["encoder_hidden_states"])
    baseline = count_flops(lambda: unet(*inputs))
    monkeypatch.setattr(int8, "AVAILABLE", True)
    found = []
    for exact in (False, True):
        with apply_tome(unet, ratio=ratio, targets="attn", exact_matching=exact):
            found.append(count_flops(lambda: unet(*inputs)))
    tomesd.apply_patch(unet, ratio=ratio)
    found.append(count_flops(lambda: unet(*inputs)))
    tomesd.remove_patch(unet)
    assert found[0] == found[1] == found[2] < baseline

    # And by hand: 2 images, 3 self-attentions with 256 tokens of width 16 each.
    left = 256 - int(256 * ratio)
    saved = 4 * 2 * (256 - left) * 16 * 16  # q, k, v and the projection behind them
    saved += 2 * 2 * (256**2 - left**2) * 16  # scores and weighted means
    search = 2 * 192 * 64 * 16
    assert baseline - found[0] == 2 * 3 * (saved - search)
