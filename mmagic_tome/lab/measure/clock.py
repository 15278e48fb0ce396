# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Seconds of a call, and of each step in it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import ToMeError
from ...patch import Interceptor, intercept, interceptors_of, release

T = TypeVar("T")

#: Wall time, or the CPU seconds of this process (all its threads).
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def synchronize(device: str | torch.device) -> None:
    """Return when the device has finished all its work; at once on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Measures the seconds of a call.

    Args:
        device: Where the call works.
        kind: ``'wall'`` (default), or ``'cpu'`` for a CPU that other programs use too. Threads
            that wait for each other count, so use one thread with it.

    Raises:
        ToMeError: Another kind; the CPU clock for work on a GPU.

    Example:
        >>> seconds, output = Clock("cuda")(lambda: network(x))
    """

    def __init__(self, device: str | torch.device, kind: str = "wall") -> None:
        self.device = torch.device(device)
        if kind not in CLOCKS:
            raise ToMeError(f"there is no clock {kind!r}; write one of {', '.join(CLOCKS)}")
        if kind == "cpu" and self.device.type != "cpu":
            raise ToMeError(f"CPU seconds do not measure {self.device.type}; write clock='wall'")
        self.now = CLOCKS[kind]

    def __call__(self, function: Callable[[], T]) -> tuple[float, T]:
        """Return (seconds, what ``function`` returned), synchronized at both ends."""
        gc.collect()
        synchronize(self.device)
        start = self.now()
        result = function()
        synchronize(self.device)
        return self.now() - start, result


class StepMarks:
    """Marks the start and the end of every call of a module, inside a with statement.

    Calls that step caching skips are marked too. On CUDA the marks are events, so nothing waits
    for the device until :meth:`seconds`.

    Args:
        module: The network whose calls are the steps of a run.
        device: Where it is.
        on_step: Called without arguments after each call, such as ``bar.update``.

    Example:
        >>> with StepMarks(pipeline.unet, "cuda") as marks:
        ...     pipeline("a red apple")
        >>> marks.seconds()
    """

    def __init__(
        self,
        module: nn.Module,
        device: str | torch.device,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        self.module = module
        self.device = torch.device(device)
        self.on_step = on_step
        self._spans: list[tuple[Any, Any]] = []
        self._interceptor = _Marking(self)

    def __enter__(self) -> StepMarks:
        intercept(self.module, self._interceptor, first=True)
        return self

    def __exit__(self, *error: object) -> None:
        release(self.module, self._interceptor)

    def seconds(self) -> list[float]:
        """Return the seconds of each call that ended without an error, in order."""
        if self.device.type != "cuda":
            return [end - start for start, end in self._spans]
        synchronize(self.device)
        return [start.elapsed_time(end) / 1000 for start, end in self._spans]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class _Marking(Interceptor):
    """Runs around a call of the module, or around what runs in its place (a cache, other marks)."""

    skips = True

    def __init__(self, marks: StepMarks) -> None:
        super().__init__(patch=None)
        self.marks = marks

    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        everyone = interceptors_of(module)
        inner = (one for one in everyone[everyone.index(self) + 1 :] if one.skips)
        following = next(inner, None)
        start = self.marks._now()
        if following is None:
            output = proceed(module, *args, **kwargs)
        else:
            output = following.call(module, proceed, args, kwargs)
        self.marks._spans.append((start, self.marks._now()))
        if self.marks.on_step is not None:
            self.marks.on_step()
        return output
