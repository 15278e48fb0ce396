# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Seconds of calls and of steps."""

import time

import pytest
import torch
from denoise import STEPS, denoise
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeError, apply_cache
from mmagic_tome.lab.measure import Clock, StepMarks, clock


def test_clock_of_the_wall_and_of_the_processor():
    def sleep():
        time.sleep(0.1)
        return 7

    seconds, result = Clock("cpu")(sleep)
    assert result == 7 and seconds >= 0.1
    assert Clock("cpu", "cpu")(sleep)[0] < 0.1
    with pytest.raises(ToMeError, match="no clock 'sun'; write one of wall, cpu"):
        Clock("cpu", "sun")
    with pytest.raises(ToMeError, match="do not measure cuda"):
        Clock("cuda", "cpu")


def test_clock_synchronizes_at_both_ends(monkeypatch):
    done = []
    monkeypatch.setattr(clock, "synchronize", lambda device: done.append("synchronize"))
    timer = Clock("cpu")
    timer.now = lambda: done.append("now") or float(len(done))
    assert timer(lambda: done.append("work")) == (3.0, None)
    assert done == ["synchronize", "now", "work", "synchronize", "now"]


def test_marks_are_around_each_call_and_gone_afterwards():
    module = torch.nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    steps = []
    with StepMarks(module, "cpu", on_step=lambda: steps.append(1)) as marks:
        for _ in range(3):
            module(torch.ones(1, 2))
        with pytest.raises(RuntimeError):
            module(torch.ones(1, 3))
    module(torch.ones(1, 2))
    assert len(marks.seconds()) == len(steps) == 3 and min(marks.seconds()) >= 0.02
    assert type(module) is torch.nn.Linear


def test_two_marks_on_one_module():
    module = torch.nn.Linear(2, 2)
    with StepMarks(module, "cpu") as outer, StepMarks(module, "cpu") as inner:
        module(torch.ones(1, 2))
    module(torch.ones(1, 2))
    # The one that came last is outermost.
    assert 0 < outer.seconds()[0] < inner.seconds()[0] and len(inner.seconds()) == 1


@pytest.mark.parametrize("marks_first", [False, True])
def test_steps_that_step_caching_skips_are_marked_too(marks_first):
    unet, inputs = tiny_unet(), tiny_inputs()
    plain = denoise(unet, inputs)
    marks = StepMarks(unet, "cpu")
    if marks_first:
        with marks, apply_cache(unet, region="network") as handle:
            merged = denoise(unet, inputs)
    else:
        with apply_cache(unet, region="network") as handle, marks:
            merged = denoise(unet, inputs)
        assert len(marks.seconds()) == len(STEPS)
    with apply_cache(unet, region="network") as handle:
        assert torch.equal(denoise(unet, inputs), merged)
        (region,) = handle.stats()
    seconds = marks.seconds()
    assert len(seconds) == len(STEPS) and region["skipped"] > 0
    # A skipped step takes no time next to a computed one.
    assert sum(s < max(seconds) / 4 for s in seconds) >= region["skipped"]
    assert torch.equal(denoise(unet, inputs), plain)
