# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Generates images or clips; with ``compare`` also the baseline's, and measures both; with ``maps``
also draws which tokens were merged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..errors import ToMeError
from ..settings import Handles
from ..validate import check_integer
from . import maps as drawing
from . import plots
from .environment import environment
from .files import write_text
from .measure import FEWEST_ROUNDS, interleaved, interval, ratios
from .methods import BASELINE, Method, predicted_errors
from .progress import progress_bar
from .request import Request
from .runners import Output, Runner, Source, frame_strip, save_media
from .runners.media import to_tensor

ROWS_OF_SHEET = 16
WARM_UP_STEPS = 2


def check(
    source: Source, request: Request, method: Method, compare: bool = False, maps: bool = False
) -> None:
    """Fail if :func:`infer` cannot work; nothing is loaded.

    Raises:
        ToMeError: The model cannot serve the request; there is nothing to compare or to draw.
    """
    if maps and source.video:
        raise ToMeError(
            f"visualize draws images, and {source.class_name} makes clips; use infer --compare"
        )
    tome = getattr(method.setting, "tome", None)
    if maps and (tome is None or tome.merges_nothing):
        raise ToMeError(
            f"{method.name!r} merges no tokens, so there is nothing to draw (step caching has no "
            "merge maps); pass --ratio 0.5"
        )
    source.check(request)
    if compare and method.kind == "baseline":
        raise ToMeError(
            "nothing to compare: neither tokens are merged nor steps skipped; pass --cache "
            "balanced or --ratio 0.5, or add cache_cfg='balanced' to the config"
        )


def infer(
    source: Source,
    request: Request,
    method: Method | None = None,
    *,
    compare: bool = False,
    maps: bool = False,
    rounds: int | None = None,
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Generate images or clips, write them with a ``results.json``, and print a report.

    Args:
        source, request, device: What is run, on what, where.
        method: What is applied. Default: None, what the config applies.
        compare: Also run the baseline, in interleaved rounds; measure the speed-up, and how close
            images and latents are to the baseline's; write ``compare.png``.
        maps: Compare images once, one by one, and write the merge maps of each, see
            :func:`~.maps.merge_sheet`.
        rounds: How often everything is run. Default: None, once; with ``compare`` as often as it
            takes for five pairs of runs, with which a speed-up can be certain.
        folder: Where files go.
        dtype: Of the whole model. Default: None, the source's.
        progress: Whether to show a bar.

    Returns:
        dict: What is in ``results.json``.

    Raises:
        ToMeError: See :func:`check`; the model cannot be loaded, or the method not be applied.
        KeyboardInterrupt: Its message tells what is complete.
    """
    method = method or Method(source.setting.description, source.setting)
    check(source, request, method, compare, maps)
    if rounds is not None:
        check_integer("", "rounds", rounds, 1)
    if maps:
        request, compare, rounds = dataclasses.replace(request, batch_size=1), True, 1
    runner = source.load(request, device, dtype)
    methods = [BASELINE, method] if compare else [method]
    if rounds is None:
        rounds = math.ceil(FEWEST_ROUNDS / len(request.batches())) if compare else 1
    steps = sum(one.steps or runner.steps for one in methods) * len(request.batches()) * rounds
    with progress_bar(steps, "generating", show=progress) as bar:
        run = _Run(runner, methods, Path(folder), maps, bar)
        try:
            run.rounds(rounds)
        except KeyboardInterrupt:
            there = f"; {len(run.images)} of {len(request)} are complete in {folder}"
            raise KeyboardInterrupt(there if run.images else "") from None
    result = run.result()
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write_text(run.folder / "results.json", text)
    print(report(result, run.folder))
    return result


class _Run:
    """Runs the method, or the baseline too, in rounds; writes the images of the first round."""

    def __init__(
        self, runner: Runner, methods: Sequence[Method], folder: Path, maps: bool, bar: tqdm
    ) -> None:
        self.runner, self.methods, self.folder, self.maps = runner, methods, folder, maps
        self.bar = bar
        # Per image, of each run: of the whole call, and of the network alone.
        self.seconds = {method.name: {"whole": [], "network": []} for method in methods}
        self.images: list[dict[str, Any]] = []
        self.sheet: list[tuple[str, list[Image.Image]]] = []
        self.records: list[drawing.Record] = []  # merge maps of the last run
        self.predicted: list[float | None] = []  # errors of the last batch's images
        self.applied: dict[str, Any] = {}
        self.settings = runner.settings
        self.environment = environment(runner.device)

    def rounds(self, rounds: int) -> None:
        """Run all methods on every batch, in balanced order; before a comparison all warm up."""
        batches = self.runner.request.batches()
        for method in self.methods if len(self.methods) > 1 else ():
            with method.on(self.runner.model):
                self.runner.run(batches[0], min(WARM_UP_STEPS, self.runner.steps))
        for turn in range(rounds * len(batches)):
            numbers = batches[turn % len(batches)]
            calls = {one.name: partial(self._call, one, numbers) for one in self.methods}
            outputs = {name: output for _, name, output in interleaved(calls, [turn])}
            for name, output in outputs.items():
                self.seconds[name]["whole"].append(output.seconds / len(numbers))
                self.seconds[name]["network"].append(output.network_seconds / len(numbers))
            if turn < len(batches):
                for place, number in enumerate(numbers):
                    self._save(number, place, [outputs[one.name] for one in self.methods])

    def _call(self, method: Method, numbers: Sequence[int]) -> Output:
        is_last = method is self.methods[-1]
        with method.on(self.runner.model) as handles, contextlib.ExitStack() as stack:
            on_step = self.bar.update
            if self.maps and is_last:
                blocks = drawing.merged_blocks(handles.tome, drawing.MOST_BLOCKS)
                recorder = stack.enter_context(drawing.Recorder(blocks))
                self.records = recorder.records
                on_step = partial(_next_step, recorder, self.bar)
            output = self.runner.run(numbers, method.steps, on_step)
            if is_last:
                self.predicted = predicted_errors(handles, len(numbers))
                self.applied = {
                    "done": what_was_done(method, handles),
                    "stats": {handle.technique: handle.stats() for handle in handles},
                    "summary": [handle.summary() for handle in handles],
                }
        return output

    def _save(self, number: int, place: int, outputs: Sequence[Output]) -> None:
        """Write an image of each method, with what it takes to make it again."""
        request, prompt = self.runner.request, self.runner.request.prompts[number]
        row: dict[str, Any] = {"prompt": prompt, "seed": request.seed_of(number)}
        text = {
            **self.settings,
            **row,
            "negative_prompt": (request.negatives([number]) or [""])[0],
            "versions": json.dumps(self.environment["versions"]),
        }
        stem = str(self.folder / file_stem(number, prompt))
        images = [output.images[place] for output in outputs]
        for method, image in zip(self.methods, images):
            key, end = (
                ("file", "") if method is self.methods[-1] else ("baseline_file", "_baseline")
            )
            text["method"] = json.dumps(method.to_dict())
            row[key] = save_media(stem + end, image, self.runner.fps, text).name
        if len(images) > 1:
            row.update(fidelity(*outputs, place), predicted_error=self.predicted[place])
            if number < ROWS_OF_SHEET:
                caption = f"{prompt}  (seed {row['seed']}, {fidelity_text(row)})"
                self.sheet.append((caption, [frame_strip(image) for image in images]))
        if self.maps:
            sheet = drawing.merge_sheet(prompt, self.records, images[-1])
            row["merge_sheet"] = save_media(f"{stem}_merge", sheet, text=text).name
        self.images.append(row)

    def result(self) -> dict[str, Any]:
        """What is in ``results.json``; the sheet is drawn."""
        result: dict[str, Any] = {
            "settings": self.settings,
            "method": self.methods[-1].to_dict(),
            "applied": self.applied,
            "seconds_per_image": self.seconds,
            "images": self.images,
            "environment": self.environment,
        }
        if len(self.methods) == 1:
            return result
        base, other = (self.seconds[one.name] for one in self.methods)
        for key, part in (("speedup", "whole"), ("network_speedup", "network")):
            found = interval(ratios(base[part], other[part]))
            text = f"{found.text()}{'' if found.excludes(1) else ', within noise'}"
            result[key] = {**dataclasses.asdict(found), "text": text}
        # Over a small image there is no room for more, and ~ says the same.
        speedup = result["speedup"]["text"].removesuffix(", within noise")
        heads = [
            f"baseline\n{median(base['whole']):.2f} s per image",
            f"{self.applied['done']}: {speedup}\n{median(other['whole']):.2f} s per image",
            f"difference\nbrightest: {plots.FULL_SCALE} of 255 and more",
        ]
        title = "{class_name}, {steps} steps, {size}, {device} {dtype}".format(**self.settings)
        rows = [(caption, [*pair, plots.difference_map(*pair)]) for caption, pair in self.sheet]
        sheet = plots.contact_sheet(title, heads, rows)
        result["compare"] = save_media(self.folder / "compare", sheet).name
        return result


def _next_step(recorder: drawing.Recorder, bar: tqdm) -> None:
    recorder.next_step()
    bar.update()


# --- words and figures ----------------------------------------------------------------------------


def what_was_done(method: Method, handles: Handles) -> str:
    """'merged', 'cached' or both, by what happened in a run; the label of other methods."""
    if method.kind != "ours":
        return method.label
    tome, cache = handles.tome, handles.cache
    merged = tome is not None and any(row["calls"] > row["unmerged_calls"] for row in tome.stats())
    cached = cache is not None and any(row["skipped"] for row in cache.stats())
    return " and ".join(["merged"] * merged + ["cached"] * cached) or "nothing merged or skipped"


def fidelity(base: Output, other: Output, place: int) -> dict[str, float | None]:
    """How close an image and its latents are to the baseline's: ``psnr`` in dB, None if they are
    identical (JSON has no infinity); relative ``latent_error``, None if latents are not known."""
    from .metrics import paired

    psnr = paired("psnr")
    images = (one.images[place] for one in (base, other))
    frames = (one if isinstance(one, (list, tuple)) else [one] for one in images)
    value = psnr.mean(psnr(*map(to_tensor, frames)))
    error = None
    if base.latents is not None and other.latents is not None:
        both = (one.latents[place : place + 1] for one in (base, other))
        error = float(paired("latent_error")(*both))
    return {"psnr": value if math.isfinite(value) else None, "latent_error": error}


def fidelity_text(row: Mapping[str, Any]) -> str:
    """:func:`fidelity` in words."""
    text = "identical" if row["psnr"] is None else f"PSNR {row['psnr']:.1f} dB"
    error = row["latent_error"]
    if error is None:
        return text
    predicted = row["predicted_error"]
    said = "" if predicted is None else f" (predicted {predicted:.4f})"
    return f"{text}, latent error {error:.4f}{said}"


def file_stem(number: int, prompt: str) -> str:
    """A file name for an image: its number and the start of its prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{number:04d}_{slug}" if slug else f"{number:04d}"


def report(result: Mapping[str, Any], folder: Path) -> str:
    """Where files are, what was applied, and how long it took, as text to print."""
    images, applied = result["images"], result["applied"]
    lines = [f"{len(images)} generated, with results.json: {folder}"]
    for row in images[:ROWS_OF_SHEET]:
        close = f"  {fidelity_text(row)}" if "psnr" in row else ""
        maps = f"  {row['merge_sheet']}" if "merge_sheet" in row else ""
        lines.append(f"  {row['file']}{close}{maps}  {row['prompt']}")
    if len(images) > ROWS_OF_SHEET:
        lines.append(f"  ... and {len(images) - ROWS_OF_SHEET} more")
    if "compare" in result:
        lines.append(f"Side by side: {folder / result['compare']}")
    lines += ["", f"In the last run: {applied['done']}", *applied["summary"], ""]
    lines.append(f"Seconds per image, {result['settings']['steps']} steps [network alone]:")
    for name, one in result["seconds_per_image"].items():
        lines.append(f"  {name}: {median(one['whole']):.2f} [{median(one['network']):.2f}]")
    if "speedup" not in result:
        return "\n".join([*lines, "  without a warm-up; --compare measures the speed-up"])
    speedup, network = result["speedup"], result["network_speedup"]["text"]
    lines.append(f"  speed-up: {speedup['text']} [{network}]")
    pairs = "one pair" if speedup["count"] == 1 else f"{speedup['count']} interleaved pairs"
    lines.append(f"  medians of {pairs} of runs, after a warm-up")
    return "\n".join(lines)
