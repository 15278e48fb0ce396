# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What methods cost: time in interleaved rounds, memory and operations of runs of their own.

Measured apart from making images: times of those would belong to different hours, and on several
ranks to different devices.
"""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from .environment import environment
from .measure import count_flops, interleaved, peak_memory
from .methods import BASELINE, Method
from .networks import Arguments
from .progress import progress_bar
from .results import RunFolder
from .runners.base import Output, Runner

WARM_UP_STEPS = 2
_LATENTS = ("hidden_states", "sample", "x")


def measure_cost(
    runner: Runner,
    methods: Sequence[Method],
    rounds: int,
    folder: RunFolder,
    progress: bool = True,
) -> None:
    """Add what a folder lacks of the rows ``round``, ``memory`` and ``flops``.

    The first batch of the runner's request is generated, and thrown away. Rounds of an earlier call
    count if all methods ran in them; the rows of a round are added all at once.
    """
    numbers = runner.request.batches()[0]
    turns = missing_turns(folder.find(kind="round"), [one.name for one in methods], rounds)
    once = [one for one in methods if not folder.has(kind="flops", method=one.name)]
    steps = sum(one.steps or runner.steps for one in methods) * len(turns)
    steps += min(WARM_UP_STEPS, runner.steps) * (len(methods) if turns else 0)
    steps += sum(2 * (one.steps or runner.steps) for one in once)
    if turns:
        folder.add({"kind": "environment", **environment(runner.device)})
    with progress_bar(steps, "measuring cost", show=progress) as bar:
        calls: dict[int, list[Arguments]] = {}
        for method in once:
            bar.set_postfix_str(f"{method.name}, memory and operations")
            count = method.steps or runner.steps
            if count not in calls:
                with BASELINE.on(runner.model):
                    calls[count] = record_calls(runner, numbers, count)
            folder.add(*_memory_and_flops(runner, method, numbers, calls[count], bar))
        for method in methods if turns else ():
            bar.set_postfix_str(f"{method.name}, warm-up")
            with warnings.catch_warnings():
                # Of step caching, that so short a run skips nothing.
                warnings.simplefilter("ignore")
                _run(runner, method, numbers, bar, min(WARM_UP_STEPS, runner.steps))
        runs = {one.name: partial(_run, runner, one, numbers, bar, one.steps) for one in methods}
        rows = (
            {
                **{"kind": "round", "method": name, "turn": turn, "images": len(numbers)},
                **{"seconds": output.seconds, "network_seconds": output.network_seconds},
            }
            for turn, name, output in interleaved(runs, turns)
        )
        add_rounds(folder, rows, len(methods))


def missing_turns(rows: Iterable[Mapping[str, Any]], names: Iterable[str], rounds: int) -> range:
    """Numbers for the rounds that are missing from rows with ``method`` and ``turn``: a round
    counts if all methods of these names ran in it."""
    ran: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        ran[row["method"]].add(row["turn"])
    first = 1 + max(set.union(*ran.values()), default=-1) if ran else 0
    complete = set.intersection(*(ran[name] for name in names))
    return range(first, first + max(0, rounds - len(complete)))


def add_rounds(folder: RunFolder, rows: Iterable[Mapping[str, Any]], methods: int) -> None:
    """Add the rows of interleaved runs of so many methods, those of a round all at once."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, methods)):
        folder.add(*batch)


def _run(
    runner: Runner, method: Method, numbers: Sequence[int], bar: tqdm, steps: int | None
) -> Output:
    with method.on(runner.model):
        return runner.run(numbers, steps, on_step=bar.update)


def _memory_and_flops(
    runner: Runner, method: Method, numbers: Sequence[int], calls: list[Arguments], bar: tqdm
) -> list[dict[str, Any]]:
    """The rows of a method, which is applied anew for each figure: what an earlier run keeps would
    be freed within the measurement, which would then come out too small."""

    def run() -> None:
        runner.run(numbers, method.steps, on_step=bar.update)

    def network() -> None:
        for args, kwargs in calls:
            runner.network(*args, **kwargs)

    with method.on(runner.model):
        run_bytes = peak_memory(run, runner.device)
    with method.on(runner.model), torch.no_grad():
        network_bytes = peak_memory(network, runner.device)
    with method.on(runner.model):
        flops, network_flops = count_flops(run, runner.network)
    named = {"method": method.name, "images": len(numbers)}
    memory = {"run_bytes": run_bytes, "network_bytes": network_bytes}
    operations = {"run": flops, "network": network_flops}
    return [{"kind": "memory", **named, **memory}, {"kind": "flops", **named, **operations}]


def record_calls(
    runner: Runner, numbers: Sequence[int], steps: int | None = None
) -> list[Arguments]:
    """The arguments of every call of the network in a run, all with the latents of the first.

    Latents of later steps belong to the baseline's outputs, and step caching checks that latents
    follow from its own; equal ones do.
    """
    calls: list[Arguments] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        name = next((name for name in _LATENTS if name in kwargs), None)
        if calls and args and _same_shape(args[0], calls[0][0][0]):
            args = (calls[0][0][0], *args[1:])
        elif calls and not args and _same_shape(kwargs.get(name), calls[0][1].get(name)):
            kwargs[name] = calls[0][1][name]
        calls.append((args, kwargs))

    hook = runner.network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        runner.run(numbers, steps)
    finally:
        hook.remove()
    return calls


def _same_shape(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
