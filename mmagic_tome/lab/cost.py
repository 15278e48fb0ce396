# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What methods cost: time in interleaved rounds, memory and operations of runs of their own.

Measured apart from making images: times of those would belong to different hours, and on several
ranks to different devices.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from .measure import FEWEST_ROUNDS, WARM_UP_STEPS, count_flops, interleaved, peak_memory
from .methods import Method
from .progress import progress_bar
from .request import Request
from .results import RunFolder
from .runners.base import Output, Runner


def default_rounds(request: Request) -> int:
    """So many that a speed-up can be certain, and that every batch runs equally often."""
    batches = len(request.batches())
    return batches * -(-FEWEST_ROUNDS // batches)


def measure_cost(
    runner: Runner,
    methods: Sequence[Method],
    rounds: int,
    folder: RunFolder,
    memory: bool = True,
    progress: bool = True,
) -> None:
    """Add what a folder lacks of the rows ``round`` and, with ``memory``, ``memory`` and ``flops``.

    A round is of one batch of the runner's request, the next one of the next batch: what a
    tolerance skips depends on the image. Memory and operations are those of the first batch. Rounds
    of an earlier call count if all methods ran in them.
    """
    batches = runner.request.batches()
    turns = missing_turns(folder.find(kind="round"), [one.name for one in methods], rounds)
    once = [one for one in methods if not folder.has(kind="flops", method=one.name)]
    once = once if memory else []
    steps = sum(one.steps or runner.steps for one in methods) * len(turns)
    steps += min(WARM_UP_STEPS, runner.steps) * (len(methods) if turns else 0)
    steps += sum(2 * (one.steps or runner.steps) for one in once)
    with progress_bar(steps, "measuring cost", show=progress) as bar:
        for method in once:
            bar.set_postfix_str(f"{method.name}, memory and operations")
            folder.add(*_memory_and_flops(runner, method, batches[0], bar))
        for method in methods if turns else ():
            bar.set_postfix_str(f"{method.name}, warm-up")
            with warnings.catch_warnings():
                # Of step caching, that so short a run skips nothing.
                warnings.simplefilter("ignore")
                _run(runner, method, batches[0], bar, min(WARM_UP_STEPS, runner.steps))
        for turn in turns:
            numbers = batches[turn % len(batches)]
            runs = {one.name: partial(_run, runner, one, numbers, bar) for one in methods}
            known = {"kind": "round", "turn": turn, "images": len(numbers)}
            rows = [
                {
                    **{**known, "method": name, "seconds": output.seconds},
                    "network_seconds": output.network_seconds,
                }
                for _, name, output in interleaved(runs, [turn])
            ]
            folder.add(*rows)


def missing_turns(rows: Iterable[Mapping[str, Any]], names: Iterable[str], rounds: int) -> range:
    """Numbers for the rounds that are missing from rows with ``method`` and ``turn``: a round
    counts if all methods of these names ran in it."""
    ran: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        ran[row["method"]].add(row["turn"])
    first = 1 + max(set.union(*ran.values()), default=-1) if ran else 0
    complete = set.intersection(*(ran[name] for name in names))
    return range(first, first + max(0, rounds - len(complete)))


def _run(
    runner: Runner, method: Method, numbers: Sequence[int], bar: tqdm, steps: int | None = None
) -> Output:
    with method.on(runner.model):
        return runner.run(numbers, steps or method.steps, on_step=bar.update)


def _memory_and_flops(
    runner: Runner, method: Method, numbers: Sequence[int], bar: tqdm
) -> list[dict[str, Any]]:
    """The rows of a method, which is applied anew for each figure: what an earlier run keeps would
    be freed within the measurement, which would then come out too small."""

    def run() -> None:
        runner.run(numbers, method.steps, on_step=bar.update)

    with method.on(runner.model):
        run_bytes = peak_memory(run, runner.device)
    with method.on(runner.model):
        operations = count_flops(run)
    named = {"method": method.name, "images": len(numbers)}
    return [
        {"kind": "memory", **named, "run_bytes": run_bytes},
        {"kind": "flops", **named, "run": operations},
    ]
