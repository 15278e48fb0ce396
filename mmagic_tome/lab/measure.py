# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The measuring core: the only clock, order of runs, interval, memory and FLOPs of the lab.

A speed-up is always measured the same way: all methods run once per round, in a balanced order
(:func:`interleaved`); seconds are divided within each round (:func:`ratios`); and the median ratio
is stated with the interval of the sign test (:func:`interval`).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from scipy.stats import binom
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ToMeError
from ..patch import Interceptor, intercept, interceptors_of, release

T = TypeVar("T")

#: Denoising steps of a run that is not counted, before times are measured.
WARM_UP_STEPS = 2


def synchronize(device: str | torch.device) -> None:
    """Return when the device has finished all its work; at once on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], T], device: str | torch.device) -> tuple[float, T]:
    """Call a function; return (seconds, what it returned), synchronized at both ends."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


class StepMarks(Interceptor):
    """Measures the seconds of every call of some networks, inside a with statement, also of calls
    that step caching skips. On CUDA the marks are events, so nothing waits for the device until
    :meth:`seconds`.

    Args:
        networks: The network whose calls are the steps of a run, or several.
        device: Where they are.
        on_step: Called without arguments after each step, such as ``bar.update``.
        calls: Calls of a step. Default: 1. None: :meth:`end_step` is called after each step.
    """

    skips = True  # around what runs in place of the network: a cache, other marks

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        device: str | torch.device,
        on_step: Callable[[], object] | None = None,
        calls: int | None = 1,
    ) -> None:
        super().__init__(patch=None)
        self.networks = [networks] if isinstance(networks, nn.Module) else networks
        self.device = torch.device(device)
        self.on_step, self.calls = on_step, calls
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> StepMarks:
        for network in self.networks:
            intercept(network, self, first=True)
        return self

    def __exit__(self, *error: object) -> None:
        for network in self.networks:
            release(network, self)

    def end_step(self, *_: Any) -> dict[str, Any]:
        """Note the end of a step; diffusers' ``callback_on_step_end``, which changes nothing."""
        if self.on_step is not None:
            self.on_step()
        return {}

    def seconds(self) -> list[float]:
        """Return the seconds of each call that ended without an error, in order."""
        synchronize(self.device)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in self._spans]
        return [end - start for start, end in self._spans]

    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        everyone = interceptors_of(module)
        inner = (one for one in everyone[everyone.index(self) + 1 :] if one.skips)
        following = next(inner, None)
        start = self._now()
        if following is None:
            output = proceed(module, *args, **kwargs)
        else:
            output = following.call(module, proceed, args, kwargs)
        self._spans.append((start, self._now()))
        if self.calls is not None and len(self._spans) % self.calls == 0:
            self.end_step()
        return output

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


# --- rounds ---------------------------------------------------------------------------------------


def balanced_order(names: Sequence[str], turn: int) -> list[str]:
    """Return the order in which n methods run in round number ``turn``, counted from 0.

    A run leaves its mark on caches, on the heap and on the processor's clock. Over n rounds of n
    methods (2 n where n is odd), every method runs after every other one equally often, and equally
    often at every place of a round (Williams, Experimental designs balanced for the estimation of
    residual effects of treatments, 1949).
    """
    count = len(names)
    # 0, 1, n-1, 2, n-2, ...: every difference between neighbours occurs once.
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    order = [names[(step + turn) % count] for step in zigzag]
    # With an odd count each difference comes from one side only; the mirror image has the other.
    return order[::-1] if count % 2 and turn // count % 2 else order


def interleaved(
    calls: Mapping[str, Callable[[], T]],
    turns: Iterable[int],
) -> Iterator[tuple[int, str, T]]:
    """Call every method once per round, so that a machine slows down for all methods alike.

    Garbage is collected before each call. Objects that exist when the rounds start are excluded,
    so that a collection takes milliseconds however many modules are loaded.

    Args:
        calls: Name -> a function that does one run.
        turns: Numbers of the rounds, such as ``range(done, rounds)`` to go on.

    Yields:
        tuple: Number of the round, name, and what the call returned.
    """
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        for turn in turns:
            for name in balanced_order(list(calls), turn):
                gc.collect()
                yield turn, name, calls[name]()
    finally:
        if not frozen:  # else the caller has frozen objects and goes on with them
            gc.unfreeze()


# --- intervals ------------------------------------------------------------------------------------

#: Probability that an interval has at least, if there are values enough.
LEVEL = 0.95
#: Nothing is certain with fewer rounds. Without any effect all of five ratios are on one side of 1
#: in 6 % of all cases; all of three in 25 %.
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Interval:
    """A median and its interval."""

    median: float
    low: float
    high: float
    coverage: float  #: probability that the true median is inside, ends included
    count: int = FEWEST_ROUNDS  #: values; with fewer than this nothing is certain

    def excludes(self, value: float) -> bool:
        """Return whether the true median is certainly different from ``value``."""
        return self.count >= FEWEST_ROUNDS and not self.low <= value <= self.high

    def text(self) -> str:
        """Return such as ``'1.45x (1.42-1.61)'``; ``'~1.05x (0.97-1.12)'`` if 1 is possible."""
        if self.low == self.high == 1:  # the baseline by itself
            return f"{self.median:.2f}x"
        if self.count == 1:
            return f"~{self.median:.2f}x (one pair gives no interval)"
        mark = "" if self.excludes(1) else "~"
        return f"{mark}{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def interval(values: Sequence[float]) -> Interval:
    """Return the median of the values of all rounds with its interval: that of the sign test.

    It lies between two of the sorted values and contains the true median with a known probability,
    whatever the distribution (Conover, Practical Nonparametric Statistics, section 3.2). Below six
    values not even the smallest and the largest reach 95 %; ``coverage`` is what they reach.
    ToMeError without values.
    """
    if not values:
        raise ToMeError("no rounds were measured, so there is no median; run at least one round")
    ordered = sorted(values)
    count = len(ordered)
    # So many values may be outside on each side.
    outside = [n for n in range(count // 2) if 2 * binom.cdf(n, count, 0.5) <= 1 - LEVEL]
    drop = max(outside, default=0)
    coverage = max(0.0, 1 - 2 * float(binom.cdf(drop, count, 0.5)))
    return Interval(median(ordered), ordered[drop], ordered[-1 - drop], coverage, count)


def ratios(base: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Return how many times as fast as ``base`` each round was; both in order of the rounds."""
    return [a / b for a, b in zip(base, seconds, strict=True)]


# --- memory ---------------------------------------------------------------------------------------


def peak_memory(function: Callable[[], Any], device: str | torch.device) -> int:
    """Return the peak, in bytes, of the tensors that a call allocates; its result counts too.

    On CUDA torch's allocator counts. On a CPU torch's profiler reports every allocation of a
    tensor, those inside operators too, and the peak is the largest sum: exact, and the same on
    every run. Buffers that libraries such as oneDNN allocate on their own are not counted. Tensors
    that existed before do not count, but on CUDA a call that frees them seems to need less: call
    ``reset_run()`` of the handles before.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's backend announces every start on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.experimental_event_tree()
    sizes: dict[int, int] = {}  # of the tensors of this call, by address
    held = peak = 0
    for _, address, size in sorted(_allocations(events), key=lambda change: change[0]):
        if size > 0:
            sizes[address] = size
            held += size
        else:
            held -= sizes.pop(address, 0)
        peak = max(peak, held)
    return peak


def _allocations(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield (time, address, bytes) of every allocation; negative bytes of every deallocation."""
    from torch._C._profiler import _EventType

    pending = events[::-1]
    while pending:
        event = pending.pop()
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        pending += event.children[::-1]


# --- floating-point operations --------------------------------------------------------------------


def count_flops(function: Callable[[], Any]) -> int:
    """Return the operations of a call without gradients, one multiply-add counting two.

    Matrix products, convolutions and attention count (``torch.utils.flop_counter``), the products
    by which merging finds similar tokens included, in 8 bits too. By convention, element-wise work,
    normalization, gathering and averaging do not. Compiled code cannot be counted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    with counter, torch.no_grad():
        function()
    return int(counter.get_total_flops())


def _attention(query, key, value, *args, out_shape=None, **kwargs):
    """Two products of every query with every key, of shapes (B, heads, tokens, width)."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


def _product(left, right, *args, out_shape=None, **kwargs):
    """Of shapes (n, k) and (k, m)."""
    return 2 * left[0] * left[1] * right[1]


# What torch's counter does not know: its own attention kernel for the CPU; the 8-bit product by
# which merging finds similar tokens where the CPU is fast at it, as much work as in floating point.
_MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._int_mm: _product,
}
