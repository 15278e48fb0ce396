# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Clocks, memory and energy of one call: what the benchmark, the evaluation and hooks measure with.

Memory is that of tensors. On a GPU the allocator keeps count; on a CPU the profiler reports every
allocation of a tensor, including those inside operators, and the peak is the largest sum. That
is exact and the same on every run. The resident memory of the process is not: it scatters by
tens of MiB between equal runs, with what the C library keeps of freed blocks.
Not counted are buffers that libraries such as oneDNN take without asking torch: the peak of the
process, where the system tells it, has them too.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

CLOCKS = ("wall", "cpu")


def finish(device: str | torch.device) -> None:
    """Return when the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of one call, finished on the device.

    Args:
        device: where the call works.
        kind (str): ``'wall'``, or ``'cpu'`` for the CPU seconds of this process.
    """

    def __init__(self, device: str | torch.device, kind: str = "wall") -> None:
        self.device = torch.device(device)
        self.now = time.process_time if kind == "cpu" else time.perf_counter

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, what ``function`` returned)."""
        gc.collect()
        finish(self.device)
        start = self.now()
        out = function()
        finish(self.device)
        return self.now() - start, out


def peak_memory(function: Callable[[], Any], device: str | torch.device) -> tuple[int, str | None]:
    """Peak of the tensors that a call holds on top of those that were there before it.

    Args:
        function: the call; what it returns counts, and is dropped.
        device: where it works.

    Returns:
        tuple: bytes, and on a CPU the operator that was running when the peak was reached
        (None if it was none).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, None
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


def reset_process_peak() -> bool:
    """Let the kernel's peak of resident memory start anew; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # a container without the right
        return False
    return True


def process_peak() -> int | None:
    """The peak of resident bytes since :func:`reset_process_peak`; None if it is not told."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def energy_reader(device: torch.device) -> Callable[[], float | None]:
    """A function that returns the device's joules so far, or None where nobody counts them."""
    if device.type != "cuda":
        return lambda: None
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES changes torch's numbers, not NVML's.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, too old a GPU, torch without uuid
        return lambda: None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def step_module(model: object) -> nn.Module:
    """The module whose calls are the steps of a run.

    Hooks on a network do not run where step caching skips its call; those on a wrapper around it do
    (MMagic's ``unet``).

    Args:
        model: whatever ``apply_tome`` takes.
    """
    from .models import find_adapter

    network = find_adapter(model)[1]
    unet = getattr(model, "unet", None)
    if isinstance(unet, nn.Module) and any(module is network for module in unet.modules()):
        return unet
    return network
