# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the pictures cost: measured apart from making them, all contenders in turn.

Times taken while pictures are made would belong to different processes and different hours
whenever an evaluation is gone on with. So the cost is measured at the end, in one process, in
rounds in which every contender runs once: what slows the machine for a while slows all of them.
Dense, which all others are divided by, runs again between them when there are many.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..apis.text2image import Generator
from ..benchmark.statistics import interval
from ..meters import peak_memory
from ..models import find_adapter
from .contenders import Contender
from .metrics.cost import CostMeter, count_flops_of, spread

WARM_UP_STEPS = 2
PROFILE_STEPS = 4
# Of fewer rounds nothing is certain: all of five are on one side of 1 in 6 % of the cases where
# there is no difference at all, three in 25 %.
FEWEST_ROUNDS = 5
# Every factor has dense in it: one slow run of it would make all contenders look faster at once.
DENSE_EVERY = 8
# What each round adds one entry to, per contender.
PER_RUN = ("seconds", "unet_seconds", "step_seconds", "process_peak_bytes", "joules")


def measure_cost(
    generator: Generator,
    contenders: Sequence[Contender],
    rounds: int,
    held: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda cost: None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Run every contender once per round and return all raw figures.

    Args:
        generator: With the request; its first batch is what runs.
        contenders: In order, dense first; every other round goes backwards. In a round dense runs
            once before every eighth of the others, and its entry is the mean of these runs.
        rounds: How often each runs, after a warm-up of two steps each.
        held: Figures of an earlier call, of the same contenders on the same machine: their rounds
            count, and only what they lack is measured.
        save: Called with the figures after each round, to be gone on with.
        batch_size: Only so many pictures of that batch run; None for all of it.

    Returns:
        ``pictures`` per run, ``rounds``, and per name of a contender lists with one entry per
        round: ``seconds`` (whole runs: text encoder, steps, VAE), ``unet_seconds``,
        ``step_seconds`` (one list per round), ``process_peak_bytes`` (resident memory of the whole
        process, None where the system does not tell), ``joules`` (of the whole device, None
        without NVML). Further ``targets`` (what was merged where) and ``regions`` (what was
        skipped how often); ``blocks``: seconds per forward of each transformer block, with what
        merging does there; ``peak_bytes`` and
        ``unet_peak_bytes``: most that tensors hold beyond what they held before, the weights, in
        a run and in one forward of the network; ``flops`` of a run, of which ``unet_flops`` in the
        network.
    """
    request = generator.request
    numbers = request.batches()[0][:batch_size]
    names = [contender.name for contender in contenders]
    cost = held
    if cost is None or cost["pictures"] != len(numbers) or list(cost["contenders"]) != names:
        figures = {name: {key: [] for key in PER_RUN} for name in names}
        cost = {"pictures": len(numbers), "rounds": 0, "contenders": figures}
    turns = range(cost["rounds"], max(rounds, cost["rounds"]))
    inside = [c for c in contenders if "flops" not in cost["contenders"][c.name]]
    steps = sum(contender.steps or request.steps for contender in _order(contenders)) * len(turns)
    steps += len(contenders) * WARM_UP_STEPS * bool(turns)
    steps += sum(PROFILE_STEPS + 2 * (c.steps or request.steps) for c in inside)
    with tqdm(
        total=steps,
        desc="measuring cost",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:
        for contender in contenders if turns else ():
            bar.set_postfix_str(f"{contender.name}, warm-up")
            with contender.on(generator.model):
                generator.run(numbers, min(WARM_UP_STEPS, request.steps), on_step=bar.update)
        for turn in turns:
            order = _order(contenders)[:: -1 if turn % 2 else 1]
            _round(generator, order, numbers, cost, turn, bar)
            save(cost)
        for contender in inside:
            bar.set_postfix_str(f"{contender.name}, layers and memory")
            with contender.on(generator.model):
                found = _inside(generator, numbers, contender.steps, bar.update)
            cost["contenders"][contender.name].update(found)
            save(cost)
    return cost


def _order(contenders: Sequence[Contender]) -> list[Contender]:
    """Return who runs after whom in a round: dense before every eighth of the others."""
    dense, others = contenders[0], list(contenders[1:])
    parts = range(0, len(others), DENSE_EVERY) or [0]
    return [x for start in parts for x in (dense, *others[start : start + DENSE_EVERY])]


def _round(generator, order, numbers, cost, turn, bar) -> None:
    """Run the contenders and append their figures; a round counts as a whole or not at all."""
    device = next(generator.model.parameters()).device
    found = {contender.name: [] for contender in order}
    stats = {}
    for contender in order:
        bar.set_postfix_str(f"{contender.name}, round {turn + 1}")
        meter = CostMeter(device, warm_up=0)
        with contender.on(generator.model) as handles:
            with meter.run(images=len(numbers)):
                _, clock = generator.run(numbers, contender.steps, on_step=bar.update)
            stats[contender.name] = {
                "targets": [] if handles.tome is None else handles.tome.stats(),
                "regions": [] if handles.cache is None else handles.cache.stats(),
            }
        (run,) = meter.runs
        seconds = list(generator.step_seconds)
        values = (run.seconds, clock.unet, seconds, run.process_memory, run.joules)
        found[contender.name].append(dict(zip(PER_RUN, values)))
    for name, runs in found.items():
        figures = cost["contenders"][name]
        figures.update(stats[name])
        for key, value in _together(runs).items():
            figures[key].append(value)
    cost["rounds"] += 1


def _together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one entry for the runs of a contender in one round: means, and the highest peak."""
    if len(runs) == 1:
        return runs[0]
    found = {}
    for key in PER_RUN:
        values = [run[key] for run in runs]
        if None in values:
            found[key] = None
        elif key == "process_peak_bytes":
            found[key] = max(values)
        else:
            found[key] = np.mean(values, axis=0).tolist()
    return found


def _inside(generator: Generator, numbers, steps, on_step) -> dict[str, Any]:
    """What is measured once: time of each block, memory, operations.

    The latter two over a whole run: not every step need do and hold the same.
    """
    device = next(generator.model.parameters()).device

    def run():
        generator.run(numbers, steps, on_step=on_step)

    blocks = block_seconds(generator, numbers, on_step)
    peak, _ = peak_memory(run, device)
    unet, args, kwargs = _first_call(generator, numbers)
    with torch.no_grad():
        unet_peak, _ = peak_memory(lambda: unet(*args, **kwargs), device)
    flops, unet_flops = count_flops_of(unet, run)
    return {
        "blocks": blocks,
        "peak_bytes": peak,
        "unet_peak_bytes": unet_peak,
        "flops": flops,
        "unet_flops": unet_flops,
    }


def is_complete(cost: dict[str, Any] | None) -> bool:
    """Whether a report can be made of some figures: rounds, and what is measured once."""
    if cost is None or cost["rounds"] == 0:
        return False
    return all("flops" in figures for figures in cost["contenders"].values())


def cost_key(fingerprint: dict, contenders: Sequence[Contender], where: dict) -> str:
    """Return a hash of what a measured cost belongs to; rounds can be added to it."""
    basis = [fingerprint, [[c.name, c.spec()] for c in contenders], where]
    return hashlib.sha256(json.dumps(basis, sort_keys=True, default=str).encode()).hexdigest()


def summarise(cost: dict, dense: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a report, per name of a contender.

    ``seconds_per_image``, ``unet_seconds_per_image``, ``speedup`` (dense / this one, paired by
    round) and ``unet_speedup`` as dicts with ``median``, ``p10`` and ``p90``;
    ``images_per_second``; ``memory_per_image`` and ``unet_memory_per_image`` in bytes above the
    weights, of the whole run and of a forward of the network, each with its ``..._factor``
    (dense / this one); ``process_peak_bytes`` and ``joules_per_image``, None where unknown;
    ``tflop_per_image`` and the network's share ``unet_tflop_per_image``, of whole runs;
    ``step_ms``: median milliseconds of each step per image; ``certain``: whether the interval of
    the median speed-up (:func:`mmagic_tome.benchmark.statistics.interval`) is on one side of 1.
    """
    count = cost["pictures"]
    base = cost["contenders"][dense]
    enough = cost["rounds"] >= FEWEST_ROUNDS
    report = {}
    for name, figures in cost["contenders"].items():
        seconds = np.array(figures["seconds"]) / count
        unet = np.array(figures["unet_seconds"]) / count
        speedup = np.array(base["seconds"]) / np.array(figures["seconds"])
        unet_speedup = np.array(base["unet_seconds"]) / np.array(figures["unet_seconds"])
        steps = np.median(np.array(figures["step_seconds"]), axis=0) / count * 1000
        factor = spread(speedup.tolist())
        report[name] = {
            "seconds_per_image": spread(seconds.tolist()),
            "unet_seconds_per_image": spread(unet.tolist()),
            "images_per_second": 1 / float(np.median(seconds)),
            "speedup": factor,
            "unet_speedup": spread(unet_speedup.tolist()),
            "certain": name == dense or (enough and interval(speedup.tolist()).excludes(1)),
            **_memory(figures, base, count),
            "process_peak_bytes": None
            if None in figures["process_peak_bytes"]
            else max(figures["process_peak_bytes"]),
            "tflop_per_image": figures["flops"] / count / 1e12,
            "unet_tflop_per_image": figures["unet_flops"] / count / 1e12,
            "joules_per_image": None
            if None in figures["joules"]
            else float(np.median(figures["joules"])) / count,
            "step_ms": steps.tolist(),
        }
    return report


def _memory(figures, base, count) -> dict[str, float]:
    found = {}
    for key, source in (("memory", "peak_bytes"), ("unet_memory", "unet_peak_bytes")):
        found[f"{key}_per_image"] = figures[source] / count
        found[f"{key}_factor"] = base[source] / figures[source]
    return found


# --- inside the network --------------------------------------------------------------------------


@contextmanager
def _watched(blocks, device, times):
    """Append (start, end) marks of every forward of some blocks to lists in ``times``.

    The hook before comes first of all and the one after last, so that what merging does at a
    block is a part of its time.
    """

    def mark():
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    hooks = []
    for block in blocks:
        marks = times.setdefault(block.name, [])

        def before(*_, marks=marks):
            marks.append([mark()])

        def after(*_, marks=marks):
            marks[-1].append(mark())

        hooks.append(block.module.register_forward_pre_hook(before, prepend=True))
        hooks.append(block.module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def block_seconds(generator: Generator, numbers, on_step) -> list[dict[str, Any]]:
    """Return seconds per image of one forward of each transformer block, in running order.

    Each is a dict with ``block``, ``downsample`` and ``seconds``, the median over a few steps.
    """
    model = generator.model
    adapter, network = find_adapter(model)
    blocks = adapter.blocks(network)
    device = next(network.parameters()).device
    times: dict[str, list] = {}
    with _watched(blocks, device, times):
        generator.run(numbers, min(PROFILE_STEPS, generator.request.steps), on_step=on_step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    rows = []
    for block in blocks:
        spans = [
            a.elapsed_time(b) / 1000 if device.type == "cuda" else b - a
            for a, b in times[block.name]
        ]
        if spans:
            seconds = float(np.median(spans)) / len(numbers)
            rows.append({"block": block.name, "downsample": block.downsample, "seconds": seconds})
    return rows


def _first_call(generator: Generator, numbers) -> tuple[Any, tuple, dict[str, Any]]:
    """Return the network and the arguments of its first forward over some pictures."""
    calls: list[tuple] = []

    def keep(module, args, kwargs):
        if not calls:
            calls.append((args, kwargs))

    unet = generator.model.unet
    hook = unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        generator.run(numbers, min(WARM_UP_STEPS, generator.request.steps))
    finally:
        hook.remove()
    return (unet, *calls[0])
