# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What pictures cost: time, memory, operations, tokens, energy."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...errors import ToMeError
from ...meters import energy_reader, finish, process_peak, reset_process_peak


@dataclass
class Run:
    """What one run of the model cost.

    Attributes:
        images: pictures that it made.
        seconds: wall clock, the device synchronised at both ends.
        cuda_memory: peak of allocated bytes on the device; None without CUDA.
        process_memory: peak of resident bytes of this process; None where the system cannot
            tell it of one run (it can on Linux).
        joules: of the whole device, through NVML; None without it.
    """

    images: int
    seconds: float
    cuda_memory: int | None = None
    process_memory: int | None = None
    joules: float | None = None


class CostMeter:
    """Measures runs of a model.

    Args:
        device: where the model runs. Default: the CPU.
        warm_up: first runs that do not count: caches, compilation, clocks. Default: 1.

    Example:
        >>> meter = CostMeter("cuda")
        >>> for batch in batches:
        ...     with meter.run(images=len(batch)):
        ...         pipeline(batch)
        >>> meter.report()["seconds_per_image"]["median"]
    """

    def __init__(self, device: str | torch.device = "cpu", warm_up: int = 1) -> None:
        if not isinstance(warm_up, int) or warm_up < 0:
            raise ToMeError(f"warm_up={warm_up!r}: write how many runs do not count, 0 or more")
        self.device = torch.device(device)
        self.warm_up = warm_up
        self.runs: list[Run] = []
        self._seen = 0
        self._energy = energy_reader(self.device)

    @contextlib.contextmanager
    def run(self, images: int = 1) -> Iterator[None]:
        """Measure the block as one run that makes ``images`` pictures; not if it raises."""
        if not isinstance(images, int) or images < 1:
            raise ToMeError(f"images={images!r}: write how many pictures the run makes")
        cuda = self.device.type == "cuda"
        finish(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        from_now = reset_process_peak()
        joules = self._energy()
        start = time.perf_counter()
        yield
        finish(self.device)
        seconds = time.perf_counter() - start
        used = self._energy()
        self._seen += 1
        if self._seen > self.warm_up:
            self.runs.append(
                Run(
                    images,
                    seconds,
                    torch.cuda.max_memory_allocated(self.device) if cuda else None,
                    process_peak() if from_now else None,
                    None if joules is None or used is None else used - joules,
                )
            )

    def report(self) -> dict[str, Any]:
        """What the runs after the warm-up cost, JSON-able.

        Returns:
            dict: ``runs`` and ``images`` (counts); ``seconds_per_image`` (:func:`spread` over
            the runs); ``images_per_second`` (all pictures over all time); ``peak_cuda_memory``,
            ``peak_process_memory`` (bytes) and ``joules_per_image``, each None where unknown.

        Raises:
            ToMeError: no run is left after the warm-up.
        """
        runs = self.runs
        if not runs:
            raise ToMeError(
                f"{self._seen} runs with a warm-up of {self.warm_up}: none is left to report; "
                "run more, or write a smaller warm_up"
            )
        images = sum(run.images for run in runs)
        joules = [run.joules for run in runs]
        return {
            "runs": len(runs),
            "images": images,
            "seconds_per_image": spread(run.seconds / run.images for run in runs),
            "images_per_second": images / sum(run.seconds for run in runs),
            "peak_cuda_memory": _largest(run.cuda_memory for run in runs),
            "peak_process_memory": _largest(run.process_memory for run in runs),
            "joules_per_image": None if None in joules else sum(joules) / images,
        }


def spread(values: Iterable[float]) -> dict[str, float]:
    """``median``, ``p10`` and ``p90`` of some figures, interpolated between neighbours.

    Raises:
        ToMeError: no figures.
    """
    values = sorted(values)
    if not values:
        raise ToMeError("no figures to take a median of")

    def quantile(share: float) -> float:
        place = share * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low])

    return {"median": statistics.median(values), "p10": quantile(0.1), "p90": quantile(0.9)}


def count_flops(run: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of a call, a multiply-add counting two.

    Counts matrix products, convolutions and attention (``torch.utils.flop_counter``, and here
    also PyTorch's attention kernel for the CPU, which that leaves out); element-wise work,
    normalisation, gathering and merging are not counted, by convention. So the products by
    which merging finds similar tokens are in it.

    Args:
        run: called once, without gradients, with ``args`` and ``kwargs``. Not compiled.
    """
    return count_flops_of(None, run, *args, **kwargs)[0]


def count_flops_of(
    part: torch.nn.Module | None, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[int, int]:
    """Operations of a call, and how many of them a module did in it; see :func:`count_flops`.

    Args:
        part: a module that is called by ``run`` as often as it likes and is in no other; None for
            none, whose share is 0.
        run: called once with ``args`` and ``kwargs``.
    """
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        # Merging finds similar tokens in 8 bits where the CPU is fast at it. It does as much work
        # as in floating point, and has to be charged as much.
        torch.ops.aten._int_mm: _product_operations,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, torch.no_grad():
        run(*args, **kwargs)
    own = {} if part is None else counter.get_flop_counts().get(type(part).__name__, {})
    return int(counter.get_total_flops()), int(sum(own.values()))


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs):
    """Of the shapes (B, heads, tokens, width): two products."""
    batch, heads, tokens, width = query
    others = key[-2]
    return 2 * batch * heads * tokens * others * (width + value[-1])


def _product_operations(left, right, *args, out_shape=None, **kwargs):
    """Of the shapes (n, k) and (k, m)."""
    return 2 * left[0] * left[1] * right[1]


def tokens_removed(stats: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens that went into targets and that were removed there, of ``ToMeHandle.stats()``.

    Args:
        stats: one mapping per target with ``tokens``, ``kept`` and ``calls``.

    Returns:
        dict: ``tokens`` and ``removed``, per picture and step, summed over the targets that ran
        (the last call counts for each), and ``share`` = removed / tokens, 0 where nothing ran.
    """
    ran = [row for row in stats if row["tokens"] is not None]
    tokens = sum(row["tokens"] for row in ran)
    removed = tokens - sum(row["kept"] for row in ran)
    return {"tokens": tokens, "removed": removed, "share": removed / tokens if tokens else 0.0}


def _largest(values: Iterable[int | None]) -> int | None:
    values = list(values)
    return None if None in values else max(values)
