# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The most memory that a call's tensors take.

On CUDA torch's allocator counts. On a CPU torch's profiler reports every allocation of a tensor,
those inside operators too, and the peak is the largest sum: exact, and the same on every run. The
resident memory of the process is neither; it differs by tens of MiB between equal runs. Buffers
that libraries such as oneDNN allocate on their own are not counted.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .clock import synchronize


def peak_memory(function: Callable[[], Any], device: str | torch.device) -> tuple[int, str | None]:
    """Return the peak of the tensors that a call allocates.

    Call ``reset_run()`` of the handles before, so that no state kept by an earlier run is reused.
    On a CPU tensors that existed before never count, not even if the call frees them; on CUDA a
    call that frees them seems to need less.

    Args:
        function: The call. Its result counts, and is dropped.
        device: Where it works.

    Returns:
        tuple: Bytes, and on a CPU the operator that ran when the peak was reached (None if none
        did, and on CUDA).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, None
    # The profiler's backend announces every start on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = list(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    changes.sort(key=lambda change: change[0])
    sizes: dict[int, int] = {}  # of the tensors of this call, by address
    held = peak = 0
    where = None
    for _, address, size, operator in changes:
        if size > 0:
            sizes[address] = size
            held += size
        else:
            held -= sizes.pop(address, 0)
        if held > peak:
            peak, where = held, operator
    return peak, where


def _allocations(events: list[Any]) -> Iterator[tuple[int, int, int, str | None]]:
    """Yield (time, address, bytes, operator) of every allocation, with negative bytes of every
    deallocation; the operator is the outermost one."""
    from torch._C._profiler import _EventType

    pending = [(event, None) for event in reversed(events)]
    while pending:
        event, operator = pending.pop()
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":
                yield event.start_time_ns, fields.ptr, fields.alloc_size, operator
        elif operator is None:
            operator = event.name
        pending += [(child, operator) for child in reversed(event.children)]
