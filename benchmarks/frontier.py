# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Whole runs by many methods: time, error and memory of each, beside fewer steps.

Of each caption the baseline and all methods draw one image, one after the other, in an order that
is balanced over the captions. So a machine that slows down does so for all, and every time has
the baseline's of the same caption beside it. An image that is missing is measured with a baseline
of its own: an interrupted run goes on, and methods can be added.

Half of the captions are for choosing settings and half for judging them, both of them held out and
trained captions in equal shares; or the held-out ones of those that judge alone.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from demo import (
    SCHEDULERS,
    decode,
    demo_pipeline,
    demo_transformer,
    draw,
    psnr,
    relative_error,
    set_scheduler,
    shares,
)
from rows import KEPT, advantage, known, paired, speedup
from torch import Tensor
from tqdm import tqdm

from mmagic_tome.lab.environment import environment
from mmagic_tome.lab.measure import balanced_order, peak_memory
from mmagic_tome.lab.methods import BASELINE, Method, predicted_errors
from mmagic_tome.lab.prompts import read_prompts, spread
from mmagic_tome.lab.report import save_record
from mmagic_tome.lab.results import RunFolder

CAPTIONS = ("choose", "judge", "held-out")
# Steps in which a method shows whether it runs: caches reuse something within them.
_TRIED = 6
#: Name -> what opens the pipeline, and options of its calls.
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "unet": (demo_pipeline, {}),
    # Without a third text encoder the pipeline appends so many tokens of zeros.
    "transformer": (demo_transformer, {"max_sequence_length": 1}),
}


@dataclass(frozen=True)
class Case:
    """What is drawn: everything but the method and the caption."""

    model: str
    size: int  #: pixels of a side
    scheduler: str  #: of :data:`demo.SCHEDULERS`; 'flow' is the transformer's own
    guidance: float  #: 1: off
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.size} px, {self.scheduler}, guidance {self.guidance:g}, "
            f"{self.steps} steps"
        )


def captions(kind: str, count: int) -> list[tuple[str, bool]]:
    """(caption, whether it is held out) in turns of both sides.

    Args:
        kind: One of :data:`CAPTIONS`: 'choose' is the even entries of both sets, 'judge' the odd
            ones, 'held-out' the odd ones of captions that the model was not trained on.
        count: At most.
    """
    sets = ("demo-held-out",) if kind == "held-out" else ("demo-held-out", "demo")
    first = 0 if kind == "choose" else 1
    sides = []
    for name in sets:
        every = [prompt.text for prompt in read_prompts(name)][first::2]
        sides.append([(text, name != "demo") for text in spread(every, -(-count // len(sets)))])
    return [one for turn in zip(*sides) for one in turn][:count]


class Bench:
    """The pipeline of a case.

    Args:
        case: What is drawn.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        build, self.options = MODELS[case.model]
        self.pipeline = build()
        if case.scheduler != "flow":
            set_scheduler(self.pipeline, case.scheduler)

    def draw(self, caption: str, seed: int, steps: int | None = None) -> Tensor:
        """The final latents of one image."""
        case, steps = self.case, steps or self.case.steps
        return draw(self.pipeline, caption, seed, case.size, steps, case.guidance, **self.options)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in 0 ... 1."""
        return decode(self.pipeline, latents)

    @functools.cached_property
    def left(self) -> dict[str, float]:
        """Region -> share of the operations of a call that are left if it is skipped."""
        size = self.case.size
        return shares(self.pipeline, height=size, width=size, **self.options)

    def measured(self, method: Method, caption: str, seed: int) -> dict[str, Any]:
        """Latents, seconds of the run and what the method says of it."""
        with method.on(self.pipeline) as handles:
            began = time.perf_counter()
            latents = self.draw(caption, seed, method.steps)
            seconds = time.perf_counter() - began
            predicted = predicted_errors(handles, 1)[0] if handles else None
            alone = handles.cache is not None and handles.tome is None
            done = (alone and handles.cache.steps) or []
        found = {"latents": latents, "seconds": seconds, "predicted": predicted}
        return found | {"operations": self._operations(method, done)}

    def _operations(self, method: Method, done: Sequence[str]) -> float | None:
        """Share of the baseline's, where the steps alone say it.

        Args:
            method: Of the run.
            done: What was done at each of its steps by step caching; empty without.
        """
        if method.kind == "fewer steps":
            return method.steps / self.case.steps
        return mean(self.left[step] for step in done) if done else None

    def memory(self, method: Method, caption: str) -> int:
        """Peak of the tensors of a run, bytes; twice for what a second run may keep."""
        with method.on(self.pipeline):
            self.draw(caption, 0, method.steps)
            return peak_memory(lambda: self.draw(caption, 0, method.steps), "cpu")


def measure(
    case: Case,
    methods: Sequence[Method],
    kind: str,
    count: int,
    folder: RunFolder,
    memory: bool = False,
) -> None:
    """Draw the images that the folder lacks.

    Args:
        case: What is drawn.
        methods: Without the baseline. One that fails is noted, and the others go on.
        kind: One of :data:`CAPTIONS`.
        count: Images.
        folder: Of this case and kind.
        memory: Whether the peak of each method is measured too.
    """
    bench: Bench | None = None
    manifest = {"command": "frontier", "case": asdict(case), "captions": kind}
    manifest["environment"] = environment("cpu")
    with folder.writing(manifest):
        usable = [one for one in methods if not folder.has(kind="failed", method=one.name)]
        texts = captions(kind, count)
        done = {(row["method"], row["number"]) for row in folder.find(kind="run")}
        missing = {
            number: [one for one in usable if (one.name, number) not in done]
            for number in range(len(texts))
        }
        total = sum(len(some) + 1 for some in missing.values() if some)
        with tqdm(total=total, desc=str(case), unit="run") as bar:
            for number, some in missing.items():
                if not some:
                    continue
                if bench is None:
                    bench = Bench(case)
                    bench.draw(texts[0][0], 0)  # what the first run does besides
                    usable = _usable(bench, usable, texts[0][0], folder, memory)
                some = [one for one in some if one in usable]
                folder.add(*_turn(bench, some, number, *texts[number], bar))


def _usable(
    bench: Bench, methods: Sequence[Method], caption: str, folder: RunFolder, memory: bool
) -> list[Method]:
    """The methods that run at all; each is tried once, and its memory measured if it is not
    known."""
    found = []
    for method in [BASELINE, *methods] if memory else methods:
        known = folder.find(kind="memory", method=method.name)
        try:
            if memory and not known:
                peak = bench.memory(method, caption)
                folder.add({"kind": "memory", "method": method.name, "bytes": peak})
            elif not folder.has(kind="run", method=method.name):
                with method.on(bench.pipeline):
                    bench.draw(caption, 0, min(_TRIED, method.steps or bench.case.steps))
            found.append(method)
        except Exception as error:  # of whatever another package does
            first = str(error).strip().splitlines() or [""]
            said = f"{type(error).__name__}: {first[0][:200]}"
            print(f"{method.name} does not run here. {said}")
            folder.add({"kind": "failed", "method": method.name, "error": said})
    return [one for one in found if one is not BASELINE]


def _turn(
    bench: Bench, methods: Sequence[Method], number: int, caption: str, held_out: bool, bar: tqdm
) -> list[dict[str, Any]]:
    """The rows of one image."""
    drawn = {}
    every = {BASELINE.name: BASELINE} | {one.name: one for one in methods}
    for name in balanced_order(list(every), number):
        drawn[name] = bench.measured(every[name], caption, number)
        bar.update()
    base = drawn.pop(BASELINE.name)
    image = bench.decode(base["latents"])
    rows = []
    for name, found in drawn.items():
        latents = found.pop("latents")
        error = relative_error(latents, base["latents"])
        row = {"kind": "run", "method": name, "number": number, "held_out": held_out}
        row |= {**found, "baseline_seconds": base["seconds"], "error": error}
        rows.append(row | {"psnr": psnr(bench.decode(latents), image)})
    return rows


# --- tables ---------------------------------------------------------------------------------------


def collected(case: Case, kind: str, folder: RunFolder) -> list[dict[str, Any]]:
    """One row per method of what a folder has, the fastest first: lists of :data:`KEPT` with an
    entry per image; ``memory`` is relative to the baseline's."""
    memory = {row["method"]: row["bytes"] for row in folder.find(kind="memory")}
    rows: dict[str, dict[str, Any]] = {}
    for run in sorted(folder.find(kind="run"), key=lambda run: run["number"]):
        row = rows.setdefault(run["method"], {**asdict(case), "captions": kind})
        row["method"] = run["method"]
        for key in KEPT:
            value = run.get(key)
            value = float(f"{value:.5g}") if isinstance(value, float) else value
            row.setdefault(key, []).append(value)
    for name, row in rows.items():
        for key in ("predicted", "operations"):
            if all(value is None for value in row[key]):
                del row[key]
        if name in memory:
            row["memory"] = memory[name] / memory[BASELINE.name]
    failed = [
        {**asdict(case), "captions": kind, "method": row["method"], "failed": row["error"]}
        for row in folder.find(kind="failed")
    ]
    return sorted(rows.values(), key=lambda row: -speedup(row)) + failed


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Speed-up, PSNR (mean, 5th percentile, worst) and the advantage over fewer steps."""
    lines = []
    keys = (*Case.__dataclass_fields__, "captions")
    for key, group in itertools.groupby(rows, key=lambda row: tuple(row[one] for one in keys)):
        some = list(group)
        runs = [row for row in some if "failed" not in row]
        lines.append(f"{Case(*key[:-1])}, {key[-1]} captions: {len(runs[0]['psnr'])} images")
        head = f"  {'':38s}  times as fast        PSNR   5 %  worst  over fewer steps   memory"
        lines.append(head)
        for row in runs:
            found, better = paired(row), advantage(runs, row)
            low, worst = np.percentile(row["psnr"], 5), min(row["psnr"])
            over = "" if better is None else f"{better:+.1f}"
            peak = f"{row['memory']:.2f}" if "memory" in row else ""
            lines.append(
                f"  {row['method']:38s}  {found.text():19s} {mean(row['psnr']):5.1f} {low:5.1f} "
                f"{worst:6.1f}  {over:>16s}   {peak:>6s}"
            )
        lines += [f"  {row['method']:38s}  {row['failed']}" for row in some if "failed" in row]
    return "\n".join(lines)


# --- the command line -----------------------------------------------------------------------------


def parser(description: str, data: Path, defaults: Case) -> argparse.ArgumentParser:
    """Options that all frontiers have; a list makes a case of each combination."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", choices=MODELS, default=defaults.model)
    made.add_argument("--size", type=int, nargs="+", default=[defaults.size], help="pixels")
    made.add_argument(
        "--schedulers", nargs="+", choices=[*SCHEDULERS, "flow"], default=[defaults.scheduler]
    )
    made.add_argument("--guidance", type=float, nargs="+", default=[3.0, 7.5])
    made.add_argument("--steps", type=int, nargs="+", default=[defaults.steps])
    made.add_argument("--captions", choices=CAPTIONS, default="choose", help="default: choose")
    made.add_argument("--images", type=int, default=8, help="per case; default: 8")
    made.add_argument("--only", metavar="PATTERN", help="methods whose names match it")
    made.add_argument("--memory", action="store_true", help="peak memory of each method too")
    made.add_argument("--threads", type=int, default=1, help="of torch; default: 1")
    made.add_argument("--table", action="store_true", help="measure nothing")
    made.add_argument("--work-dir", type=Path, default=Path("work_dirs/frontier"))
    made.add_argument("--data", type=Path, default=data, help="default: benchmarks/data/...")
    return made


def main(
    args: argparse.Namespace,
    methods: Callable[[Case], Sequence[Method]],
) -> None:
    """Measure what is missing, write the data, and print the table.

    Args:
        args: Of :func:`parser`.
        methods: Case -> its methods.
    """
    torch.set_num_threads(args.threads)
    for one in itertools.product(args.size, args.schedulers, args.guidance, args.steps):
        case = Case(args.model, *one)
        name = re.sub(r"[^a-z0-9.]+", "-", f"{case} {args.captions}".lower())
        folder = RunFolder(args.work_dir / name)
        some = methods(case)
        if args.only:
            some = [method for method in some if re.search(args.only, method.name)]
        try:
            if not args.table:
                measure(case, some, args.captions, args.images, folder, args.memory)
        finally:  # of an interrupted run what there is
            rows = collected(case, args.captions, folder)
            if rows and not args.table:
                _save(args.data, case, args.captions, rows)
        print(table(rows) if rows else f"{case}: nothing is measured")


def _save(data: Path, case: Case, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows of a case in place of those that the file has of it."""
    own = {**asdict(case), "captions": kind}
    others = [row for row in known(data) if any(row[key] != own[key] for key in own)]
    save_record(data, {"batch_size": 1, "dtype": "float32"}, [*others, *rows])
