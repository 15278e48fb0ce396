# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Clocks and memory of one call.

Memory is that of tensors. On a GPU the allocator keeps count; on a CPU the profiler reports every
allocation of a tensor, including those inside operators, and the peak is the largest sum. That
is exact and the same on every run. The resident memory of the process is not: it scatters by
tens of MiB between equal runs, with what the C library keeps of freed blocks.
Not counted are buffers that libraries such as oneDNN take without asking torch.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import torch

CLOCKS = ("wall", "cpu")


class Clock:
    """Seconds of one call, finished on the device.

    Args:
        device (str): where the call works.
        kind (str): ``'wall'``, or ``'cpu'`` for the CPU seconds of this process.
    """

    def __init__(self, device: str, kind: str = "wall") -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.now = time.process_time if kind == "cpu" else time.perf_counter

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, what ``function`` returned)."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
        start = self.now()
        out = function()
        if self.cuda:
            torch.cuda.synchronize()
        return self.now() - start, out


def peak_memory(function: Callable[[], Any], device: str) -> tuple[int, str | None]:
    """Peak of the tensors that a call holds on top of those that were there before it.

    Args:
        function: the call; what it returns counts, and is dropped.
        device (str): where it works.

    Returns:
        tuple: bytes, and on a CPU the operator that was running when the peak was reached
        (None if it was none).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, None
    # The profiler's backend announces every start on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), index, event.nbytes())
        for index, event in enumerate(events)
        if event.name() == "[memory]"
    )
    held = peak = when = 0
    for moment, _, size in changes:
        held += size
        if held > peak:
            peak, when = held, moment
    running = [
        (event.start_ns(), event.name())
        for event in events
        if event.name() != "[memory]" and event.start_ns() <= when <= event.end_ns()
    ]
    return peak, min(running)[1] if running else None
