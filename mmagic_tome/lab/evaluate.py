# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluates methods: images of the same prompts and seeds, metrics, cost.

Each stage looks for its rows in the folder and does what is missing. So a run that was killed goes
on, and methods, metrics and rounds can be added. Images are made in fixed batches: the lowest bits
of a sum may depend on the batch, so a batch that lacks an image is run as a whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mmengine.dist import barrier, get_rank
from PIL import Image
from torch import nn

from ..errors import ToMeError
from ..timeline import scheduler_of
from .cost import measure_cost
from .environment import environment
from .files import whole_file
from .methods import BASELINE, Method, check_names, predicted_errors
from .metrics import available
from .metrics.base import Metric, SetMetric
from .progress import progress_bar
from .ranks import share
from .real import RealImages
from .request import INPUTS, Request
from .results import RunFolder
from .runners.base import Output, Runner, Source
from .runners.media import save_media
from .scores import image_rows, measure_images, measure_sets
from .table import table

# Those that need no download.
DEFAULT_METRICS = (
    "psnr",
    "ssim",
    "ms_ssim",
    "latent_error",
    "efficientnet_lite0_distance",
    "frechet_efficientnet_lite0",
)


def evaluate(
    source: Source,
    request: Request,
    methods: Sequence[Method],
    metrics: Sequence[str | Mapping[str, Any]] | None = None,
    rounds: int = 9,
    folder: RunFolder | str | os.PathLike = "work_dirs/evaluate",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    real: RealImages | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Load a model and compare methods with the baseline, see :func:`evaluate_runner`.

    Args:
        source, request, device: What is run, on which images, where.
        dtype: Of the model. Default: None, the source's.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    held = folder.manifest
    if held:
        # Sums in another order differ in their last bits.
        torch.set_num_threads(held["environment"]["threads"])
    check_names([BASELINE, *methods])
    _available(metrics, request.size, len(request))
    runner = source.load(request, device, dtype)
    return evaluate_runner(runner, methods, metrics, rounds, folder, real=real, progress=progress)


def evaluate_runner(
    runner: Runner,
    methods: Sequence[Method],
    metrics: Sequence[str | Mapping[str, Any]] | None = None,
    rounds: int = 9,
    folder: RunFolder | str | os.PathLike = "work_dirs/evaluate",
    *,
    real: RealImages | None = None,
    memory: bool = True,
    command: str = "evaluate",
    progress: bool = True,
) -> pd.DataFrame:
    """Compare methods with the baseline, which is always one of them.

    Args:
        runner: What is run, on which images.
        methods: What is applied, one after the other.
        metrics: Names, or dicts of a ``name`` and options, all of which must be computable.
            Default: None, of :data:`DEFAULT_METRICS` those that are; a note says what is left out.
        rounds: Interleaved rounds in which time is measured; 0 leaves out time, memory and FLOPs.
        folder: Of the run; what it has is not done again.
        real: Images for metrics of sets. Default: None, these compare with the baseline's.
        memory: Whether to measure memory and FLOPs too.
        command: Which is to go on with the folder.
        progress: Whether to show bars.

    Returns:
        pandas.DataFrame: See :func:`~.table.table`; on ranks other than 0 without the cost.

    Raises:
        ToMeError: Whatever cannot work, before images are made where that can be told; the folder
            is of another run.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    methods = [BASELINE, *(one for one in methods if one.name != BASELINE.name)]
    check_names(methods)
    chosen, left_out = _available(metrics, runner.size, len(runner.request))
    for method in methods:
        with method.on(runner.model):
            pass  # what cannot be applied fails here, and not after hours
    options = {one["name"]: dict(one) for one in metrics or () if isinstance(one, Mapping)}
    manifest = manifest_of(runner, methods, command)
    for name, metric in chosen.items():
        # What a table needs to know of it, and the options it was asked for with.
        about = {key: getattr(metric, key) for key in ("label", "unit", "higher_is_better")}
        manifest["metrics"][name] = {**about, "options": options.get(name, {})}
    manifest["real"] = None if real is None else {"images": len(real), "digest": real.digest()}
    show = progress and get_rank() == 0
    with folder.writing(manifest):
        _meet(folder)
        for name, reason in left_out.items():
            folder.note(f"metric {name} is left out: {reason}")
        if real is None and any(isinstance(metric, SetMetric) for metric in chosen.values()):
            folder.note("without real images, metrics of sets compare with the baseline's images")
        make_images(runner, methods, folder, show)
        _meet(folder)
        for method in methods:
            finite = [row["finite"] for row in folder.find(kind="image", method=method.name)]
            if not all(finite):
                broken = f"{finite.count(False)} of {len(finite)} images of {method.name}"
                folder.note(f"{broken} are not finite")
        if not all("latents" in row for row in folder.find(kind="image")):
            for name in [name for name, metric in chosen.items() if metric.of == "latents"]:
                folder.note(f"metric {name} is left out: no latents can be seen in this model")
                del chosen[name]
        measure_images(folder, methods, chosen, runner.device, show)
        measure_sets(folder, methods, chosen, runner.device, real, runner.size, show)
        _meet(folder)
        if rounds and get_rank() == 0:
            measure_cost(runner, methods, rounds, folder, memory, show)
    return table(folder)


def _available(
    asked: Sequence[str | Mapping[str, Any]] | None, size: tuple[int, int] | None, count: int
) -> tuple[dict[str, Metric], dict[str, str]]:
    """See :func:`~.metrics.available`; ToMeError if one that was asked for by name cannot work."""
    chosen, left_out = available(DEFAULT_METRICS if asked is None else asked, size, count)
    if asked is not None and left_out:
        raise ToMeError(next(iter(left_out.values())))
    return chosen, left_out


def _meet(folder: RunFolder) -> None:
    """Wait for all ranks, and see what they wrote."""
    barrier()
    folder.reload()


def make_images(runner: Runner, methods: Sequence[Method], folder: RunFolder, show: bool) -> None:
    """Make the images that a folder lacks, by all methods."""
    done = {key for key, row in image_rows(folder).items() if (folder.path / row["file"]).is_file()}
    # Batches of all methods in one list, so that no rank waits between methods.
    missing = [
        (place, numbers)
        for place, method in enumerate(methods)
        for numbers in runner.request.batches()
        if any((method.name, number) not in done for number in numbers)
    ]
    mine = share(missing)
    # Steps, not images: with half of the steps an image takes half of the time.
    steps = sum((methods[place].steps or runner.steps) * len(numbers) for place, numbers in mine)
    with progress_bar(steps, "generating", show=show) as bar:
        for place, numbers in mine:
            method, count = methods[place], len(numbers)
            bar.set_postfix_str(method.name)
            with method.on(runner.model) as handles:
                output = runner.run(numbers, method.steps, functools.partial(bar.update, count))
                # One process makes the first batch: the row is there once.
                if 0 in numbers and not folder.has(kind="applied", method=method.name):
                    stats = {handle.technique: handle.stats() for handle in handles}
                    summary = "\n".join(handle.summary() for handle in handles)
                    known = {"kind": "applied", "method": method.name}
                    folder.add({**known, "stats": stats, "summary": summary})
                predicted = predicted_errors(handles, count)
            for index, number in enumerate(numbers):
                if (method.name, number) not in done:
                    row = _save(folder, runner, method, number, output, index)
                    folder.add({**row, "predicted_error": predicted[index]})


def _save(
    folder: RunFolder, runner: Runner, method: Method, number: int, output: Output, index: int
) -> dict[str, Any]:
    """Write an image or a clip of a batch, and its final latents; return its row."""
    request, image = runner.request, output.images[index]
    latents = None if output.latents is None else output.latents[index]
    named = {"prompt": request.prompts[number], "seed": request.seed_of(number)}
    negative = (request.negatives([number]) or [None])[0]
    text = {**runner.settings, **named, "negative_prompt": negative or ""}
    text["method"] = json.dumps(method.to_dict())
    stem = folder.path / "images" / method.slug / f"{number:06d}"
    files = {"file": save_media(stem, image, fps=runner.fps, text=text)}
    row = {"kind": "image", "method": method.name, "number": number, **named}
    row["negative_prompt"] = negative
    # NaN is black in an image. Where latents cannot be seen images are taken as they are.
    row["finite"] = latents is None or bool(torch.isfinite(latents).all())
    if isinstance(image, (list, tuple)):
        # GIF has 256 colours and MP4 loses detail; metrics need the pixels, below each other.
        frames = np.concatenate([np.asarray(frame.convert("RGB")) for frame in image])
        files["strip"] = save_media(stem, Image.fromarray(frames), text=text)
        row["frames"] = len(image)
    if latents is not None:
        # Not in half precision: the error of rounding would be as large as that of caching.
        files["latents"] = stem.with_suffix(".pt")
        with whole_file(files["latents"]) as path:
            torch.save(latents.clone(), path)
    return row | {key: path.relative_to(folder.path).as_posix() for key, path in files.items()}


# --- what images depend on ------------------------------------------------------------------------


def manifest_of(runner: Runner, methods: Sequence[Method], command: str) -> dict[str, Any]:
    """What images depend on, to be compared when a run goes on.

    Weights count as loaded: a checkpoint that was replaced is noticed, one that was moved is not.
    Reading gigabytes takes long, so only evaluations, which take longer, do it.
    """
    request, where = runner.request, environment(runner.device)
    return {
        "command": command,
        "model": runner.source.name,
        "loaded": {
            "class_name": runner.source.class_name,
            "weights": weights_digest(runner.model) if command == "evaluate" else None,
            "scheduler": runner.scheduler,
            "scheduler_config": _scheduler_config(runner.model),
        },
        "request": {
            "images": len(request),
            "prompts": request_digest(request),
            "steps": runner.steps,
            "guidance": runner.guidance,
            "size": list(runner.size),
            "frames": request.frames,
            "batch_size": request.batch_size,
            "extra": json.loads(json.dumps(dict(request.extra), default=str)),
        },
        "images_per_timed_run": len(request.batches()[0]),
        "device": runner.device.type,
        "dtype": str(runner.dtype).replace("torch.", ""),
        "environment": {key: where[key] for key in ("gpu", "processor", "threads", "versions")},
        "methods": {method.name: method.to_dict() for method in methods},
        "metrics": {},
    }


def weights_digest(model: Any) -> str:
    """A hash of all parameters and buffers of a model or pipeline, with their names."""
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", {})
    digest = hashlib.blake2b(digest_size=16)
    for part, module in sorted(parts.items()):
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in sorted(module.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                values = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _scheduler_config(model: Any) -> dict[str, str]:
    """The scheduler's settings; MMagic's own schedulers do not tell theirs."""
    config = getattr(scheduler_of(model), "config", None)
    settings = config.items() if isinstance(config, Mapping) else ()
    # diffusers lists there, in any order, which settings a file did not name.
    return {key: str(value) for key, value in settings if key != "_use_default_values"}


def request_digest(request: Request) -> str:
    """A hash of prompts, negative prompts, seeds and input images."""
    numbers = range(len(request))
    texts = [list(request.prompts), request.negatives(numbers), [*map(request.seed_of, numbers)]]
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16)
    for kind in INPUTS:
        for image in getattr(request, kind):
            is_file = isinstance(image, (str, Path))
            digest.update(Path(image).read_bytes() if is_file else image.tobytes())
    return digest.hexdigest()
