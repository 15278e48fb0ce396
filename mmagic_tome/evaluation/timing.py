# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the pictures cost: measured apart from making them, all contenders in turn.

Times taken while pictures are made would belong to different processes and different hours
whenever an evaluation is gone on with. So the cost is measured at the end, in one process, in
rounds in which every contender runs once: what slows the machine for a while slows all of them.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..apis.text2image import Generator
from ..hosts import find_host
from .contenders import Contender
from .metrics.cost import CostMeter, count_flops, spread

WARM_UP_STEPS = 2
PROFILE_STEPS = 4


def measure_cost(generator: Generator, contenders: Sequence[Contender], rounds: int) -> dict:
    """Run every contender once per round and return all raw figures.

    Args:
        generator: With the request; its first batch is what runs.
        contenders: In order; every other round goes backwards.
        rounds: How often each runs, after a warm-up of two steps each.

    Returns:
        ``pictures`` per run, and per name of a contender lists with one entry per run:
        ``seconds`` (whole runs: text encoder, steps, VAE), ``unet_seconds``, ``step_seconds``
        (one list per run), ``peak_bytes`` (peak of the memory above what was held before the
        run, which is the weights; on a CPU of the process, None where the system does not
        tell), ``joules`` (of the whole device, None without NVML). Further ``blocks``: seconds
        per forward of each transformer block, with what merging does there; ``unet_flops`` of
        one forward; ``sites`` (what was merged where).
    """
    request = generator.request
    numbers = request.batches()[0]
    device = next(generator.model.parameters()).device
    raw = {
        c.name: {
            key: [] for key in ("seconds", "unet_seconds", "step_seconds", "peak_bytes", "joules")
        }
        for c in contenders
    }
    meters = {contender.name: CostMeter(device, warm_up=0) for contender in contenders}
    steps = sum(contender.steps or request.steps for contender in contenders) * rounds
    steps += len(contenders) * (WARM_UP_STEPS + PROFILE_STEPS)
    with tqdm(
        total=steps,
        desc="measuring cost",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:
        for contender in contenders:
            bar.set_postfix_str(f"{contender.name}, warm-up")
            with contender.on(generator.model):
                generator.run(numbers, min(WARM_UP_STEPS, request.steps), on_step=bar.update)
        for turn in range(rounds):
            for contender in contenders[:: -1 if turn % 2 else 1]:
                bar.set_postfix_str(f"{contender.name}, round {turn + 1}")
                figures = raw[contender.name]
                meter = meters[contender.name]
                with contender.on(generator.model) as handle:
                    held = memory_held(device)
                    with meter.run(images=len(numbers)):
                        _, clock = generator.run(numbers, contender.steps, on_step=bar.update)
                    figures["sites"] = [] if handle is None else handle.stats()
                run = meter.runs[-1]
                figures["seconds"].append(run.seconds)
                figures["unet_seconds"].append(clock.unet)
                figures["step_seconds"].append(list(generator.step_seconds))
                peak = run.process_memory if run.cuda_memory is None else run.cuda_memory
                known = peak is not None and held is not None
                figures["peak_bytes"].append(max(0, peak - held) if known else None)
                figures["joules"].append(run.joules)
        for contender in contenders:
            bar.set_postfix_str(f"{contender.name}, layers")
            figures = raw[contender.name]
            with contender.on(generator.model):
                figures["blocks"] = block_seconds(generator, numbers, bar.update)
                figures["unet_flops"] = unet_flops(generator, numbers)
    return {"pictures": len(numbers), "rounds": rounds, "contenders": raw}


def cost_key(fingerprint: dict, contenders: Sequence[Contender], rounds: int, where: dict) -> str:
    """Return a hash of what a measured cost belongs to."""
    basis = [fingerprint, [[c.name, c.spec()] for c in contenders], rounds, where]
    return hashlib.sha256(json.dumps(basis, sort_keys=True, default=str).encode()).hexdigest()


def summarise(cost: dict, dense: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a report, per name of a contender.

    ``seconds_per_image``, ``unet_seconds_per_image``, ``speedup`` (dense / this one, paired by
    round) and ``unet_speedup`` as dicts with ``median``, ``p10`` and ``p90``;
    ``images_per_second``; ``memory_per_image`` in bytes and ``memory_factor`` (dense / this
    one) and ``joules_per_image``, None where unknown; ``unet_tflop_per_image`` over all steps;
    ``step_ms``: median milliseconds of each step per image; ``certain``: whether the spread of
    the speed-up leaves no doubt on which side of 1 it is.
    """
    count = cost["pictures"]
    base = cost["contenders"][dense]
    report = {}
    for name, figures in cost["contenders"].items():
        seconds = np.array(figures["seconds"]) / count
        unet = np.array(figures["unet_seconds"]) / count
        speedup = np.array(base["seconds"]) / np.array(figures["seconds"])
        unet_speedup = np.array(base["unet_seconds"]) / np.array(figures["unet_seconds"])
        steps = np.median(np.array(figures["step_seconds"]), axis=0) / count * 1000
        memory, dense_memory = (_memory(f["peak_bytes"], count) for f in (figures, base))
        factor = spread(speedup.tolist())
        report[name] = {
            "seconds_per_image": spread(seconds.tolist()),
            "unet_seconds_per_image": spread(unet.tolist()),
            "images_per_second": 1 / float(np.median(seconds)),
            "speedup": factor,
            "unet_speedup": spread(unet_speedup.tolist()),
            "certain": name == dense or factor["p10"] > 1 or factor["p90"] < 1,
            "memory_per_image": memory,
            "memory_factor": dense_memory / memory if memory and dense_memory else None,
            "unet_tflop_per_image": figures["unet_flops"] * len(steps) / count / 1e12,
            "joules_per_image": None
            if None in figures["joules"]
            else float(np.median(figures["joules"])) / count,
            "step_ms": steps.tolist(),
        }
    return report


def _memory(peaks, count) -> float | None:
    return None if None in peaks else max(peaks) / count


# --- memory -------------------------------------------------------------------------------------


def memory_held(device: torch.device) -> int | None:
    """Return the bytes that are held before a run: of CUDA's allocator, or of this process.

    None where the system does not tell (it does on Linux).
    """
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        # Or what the last run freed and the C library kept would hide what the next one needs.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024
    except (OSError, AttributeError, ValueError):
        return None


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
    host, network = find_host(model)
    blocks = host.blocks(network)
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


def unet_flops(generator: Generator, numbers) -> int:
    """Return floating-point operations of one forward of the UNet over a batch.

    See :func:`~mmagic_tome.evaluation.metrics.cost.count_flops` for what is counted.
    """
    calls: list[tuple] = []

    def keep(module, args, kwargs):
        if not calls:
            calls.append((args, kwargs))

    unet = generator.model.unet
    hook = unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        generator.run(numbers, WARM_UP_STEPS)
    finally:
        hook.remove()
    args, kwargs = calls[0]
    return count_flops(unet, *args, **kwargs)
