# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What methods cost: time in interleaved rounds, memory and operations of runs of their own.

Measured apart from making images: times of those would belong to different hours, and on several
ranks to different devices.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .environment import environment
from .measure import count_flops_of, interleaved, peak_memory
from .methods import BASELINE, Method
from .progress import progress_bar
from .results import RunFolder
from .runners.base import Output, Runner

WARM_UP_STEPS = 2
Call = tuple[tuple, dict[str, Any]]


def measure_cost(
    runner: Runner,
    methods: Sequence[Method],
    rounds: int,
    folder: RunFolder,
    numbers: Sequence[int] | None = None,
    progress: bool = True,
) -> None:
    """Add what a folder lacks of the rows ``round``, ``memory`` and ``flops``.

    Args:
        runner: Its request's images are what is generated, and thrown away.
        methods: All that are compared; they take turns within each round.
        rounds: Rounds that there shall be. Those of an earlier call count if all methods ran in
            them.
        folder: Where the rows go: those of a round all at once.
        numbers: The images of a run. Default: None, the request's first batch.
        progress: Whether to show a bar.
    """
    numbers = runner.request.batches()[0] if numbers is None else numbers
    turns = _missing_turns(folder, methods, rounds)
    once = [one for one in methods if not folder.has(kind="flops", method=one.name)]
    steps = sum(one.steps or runner.steps for one in methods) * len(turns)
    steps += min(WARM_UP_STEPS, runner.steps) * (len(methods) if turns else 0)
    steps += sum(2 * (one.steps or runner.steps) for one in once)
    if turns:
        folder.add({"kind": "environment", **environment(runner.device)})
    with progress_bar(steps, "measuring cost", show=progress) as bar:
        calls: dict[int, list[Call]] = {}
        for method in once:
            bar.set_postfix_str(f"{method.name}, memory and operations")
            count = method.steps or runner.steps
            if count not in calls:
                calls[count] = _network_calls(runner, numbers, count)
            folder.add(*_memory_and_flops(runner, method, numbers, calls[count], bar))
        for method in methods if turns else ():
            bar.set_postfix_str(f"{method.name}, warm-up")
            with warnings.catch_warnings():
                # Of step caching, that so short a run skips nothing.
                warnings.simplefilter("ignore")
                _run(runner, method, numbers, bar, min(WARM_UP_STEPS, runner.steps))
        _rounds(runner, methods, turns, folder, numbers, bar)


def _missing_turns(folder: RunFolder, methods: Sequence[Method], rounds: int) -> range:
    """Numbers for the rounds that are missing: a round counts if all methods ran in it."""
    ran: dict[str, set[int]] = {method.name: set() for method in methods}
    first = 0
    for row in folder.find(kind="round"):
        first = max(first, row["turn"] + 1)
        ran.setdefault(row["method"], set()).add(row["turn"])
    complete = set.intersection(*(ran[method.name] for method in methods))
    return range(first, first + max(0, rounds - len(complete)))


def _rounds(
    runner: Runner,
    methods: Sequence[Method],
    turns: range,
    folder: RunFolder,
    numbers: Sequence[int],
    bar: tqdm,
) -> None:
    calls = {one.name: partial(_run, runner, one, numbers, bar, one.steps) for one in methods}
    rows: list[dict[str, Any]] = []

    def show(turn: int, name: str) -> None:
        bar.set_postfix_str(f"{name}, round {turn + 1}")

    for turn, name, output in interleaved(calls, turns, show):
        rows.append(
            {
                "kind": "round",
                "method": name,
                "turn": turn,
                "seconds": output.seconds,
                "network_seconds": output.network_seconds,
                "step_seconds": output.step_seconds,
                "images": len(numbers),
            }
        )
        if len(rows) == len(methods):
            folder.add(*rows)
            rows.clear()


def _run(
    runner: Runner, method: Method, numbers: Sequence[int], bar: tqdm, steps: int | None
) -> Output:
    with method.on(runner.model):
        return runner.run(numbers, steps, on_step=bar.update)


def _memory_and_flops(
    runner: Runner, method: Method, numbers: Sequence[int], calls: list[Call], bar: tqdm
) -> list[dict[str, Any]]:
    """The rows of a method, each figure of a method that was applied anew: what an earlier run
    keeps between steps would be freed within the measurement, which would then come out too small.
    """

    def run() -> None:
        runner.run(numbers, method.steps, on_step=bar.update)

    def network() -> None:
        for args, kwargs in calls:
            runner.network(*args, **kwargs)

    with method.on(runner.model):
        run_bytes, where = peak_memory(run, runner.device)
    with method.on(runner.model), torch.no_grad():
        network_bytes, _ = peak_memory(network, runner.device)
    with method.on(runner.model):
        flops, network_flops = count_flops_of(runner.network, run)
    named = {"method": method.name, "images": len(numbers)}
    return [
        {
            "kind": "memory",
            **named,
            "run_bytes": run_bytes,
            "network_bytes": network_bytes,
            "operator": where,
        },
        {"kind": "flops", **named, "run": flops, "network": network_flops},
    ]


def _network_calls(runner: Runner, numbers: Sequence[int], steps: int) -> list[Call]:
    """The arguments of the network's calls in a run of the baseline. All of them: a step cache
    begins to keep outputs after the first ones."""
    calls: list[Call] = []

    def look(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    hook = runner.network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with BASELINE.on(runner.model):
            runner.run(numbers, steps)
    finally:
        hook.remove()
    return calls
