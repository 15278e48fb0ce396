#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CPU milliseconds of one thread: to make a plan, to merge and to unmerge, by every method.

The tokens are those of one block at the finest level of Stable Diffusion 1.5 at 512x512. Writes
``data/matching.json``; takes about a minute::

    python benchmarks/matching.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tomesd.merge import bipartite_soft_matching_random2d

from mmagic_tome.lab.report import save_record
from mmagic_tome.merging import random_layout
from mmagic_tome.methods import METHODS, PlanRequest, build_method

SIDE, CHANNELS, RATIO, REPEATS = 64, 320, 0.5, 15


def milliseconds(function: Callable[[], object]) -> float:
    """Median of the CPU time of a call, after one call to warm up."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def request(exact: bool) -> PlanRequest:
    """What a block in the middle of a network would ask for."""
    layout = random_layout(SIDE, SIDE, 2, 2, seed=0)
    return PlanRequest(
        SIDE, SIDE, sx=2, sy=2, level=0, exact=exact, layout=lambda: layout.select(0)
    )


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(2, SIDE * SIDE, CHANNELS)
    rows = []
    for name in ("tome", "tome, exact_matching", *sorted(set(METHODS) - {"tome"})):
        method = build_method(name.split(",")[0])
        asked = request(exact="exact" in name)
        plan = method.plan(x, RATIO, asked)
        y = plan.merge(x)
        calls = {
            "plan": lambda method=method, asked=asked: method.plan(x, RATIO, asked),
            "merge": lambda plan=plan: plan.merge(x),
            "unmerge": lambda plan=plan, y=y: plan.unmerge(y),
        }
        rows.append({"method": name} | {key: milliseconds(call) for key, call in calls.items()})

    def match() -> tuple[Callable, Callable]:
        return bipartite_soft_matching_random2d(x, SIDE, SIDE, 2, 2, int(SIDE * SIDE * RATIO), True)

    merge, unmerge = match()
    y = merge(x)
    calls = {"plan": match, "merge": lambda: merge(x), "unmerge": lambda: unmerge(y)}
    rows.append(
        {"method": "tomesd 0.1.3"} | {key: milliseconds(call) for key, call in calls.items()}
    )
    settings = dict(model=f"2 x {SIDE * SIDE} tokens of {CHANNELS} channels", dtype="float32")
    save_record(Path(__file__).parent / "data/matching.json", settings, rows)


if __name__ == "__main__":
    main()
