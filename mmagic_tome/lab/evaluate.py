# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluates methods: images of the same prompts and seeds, metrics, cost.

Each stage looks for its rows in the folder and does what is missing. So a run that was killed goes
on, and methods, metrics and rounds can be added. Images are made in fixed batches: the lowest bits
of a sum may depend on the batch, so a batch that lacks an image is run as a whole.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from mmengine.dist import barrier, get_rank

from ..errors import ToMeError
from ..settings import Handles
from .cost import measure_cost
from .images import save_image
from .manifest import manifest_of
from .methods import BASELINE, Method, check_names
from .metrics import available
from .metrics.base import Metric
from .progress import progress_bar
from .ranks import share
from .real import RealImages
from .request import Request
from .results import RunFolder
from .runners.base import Output, Runner, Source
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
    cost_batch_size: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare methods with the baseline, which is always one of them.

    Args:
        source: What is run.
        request: The images.
        methods: What is applied, one after the other.
        metrics: Names, or dicts of a ``name`` and options, all of which must be computable.
            Default: None, of :data:`DEFAULT_METRICS` those that are; a note says what is left out.
        rounds: Interleaved rounds in which time is measured; 0 leaves out time, memory and FLOPs.
        folder: Of the run; what it has is not done again.
        device: Where to run.
        dtype: Of the model. Default: None, the source's.
        real: Images for metrics of sets. Default: None, these compare with the baseline's.
        cost_batch_size: Images per run that is timed. Default: None, the request's batch size.
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
    source.check(request)
    chosen, left_out = available(
        DEFAULT_METRICS if metrics is None else metrics, request.size, len(request)
    )
    _check_metrics(metrics, left_out)
    held = folder.manifest
    if held:
        # Sums in another order differ in their last bits.
        torch.set_num_threads(held["environment"]["threads"])
    runner = source.load(request, device, dtype)
    for name, metric in list(chosen.items()):
        try:
            metric.check(runner.size)  # which may be known only now
        except ToMeError as error:
            left_out[name] = str(error)
            del chosen[name]
    _check_metrics(metrics, left_out)
    for method in methods:
        with method.on(runner.model):
            pass  # what cannot be applied fails here, and not after hours
    numbers = request.batches()[0][:cost_batch_size]
    manifest = {
        "command": "evaluate",
        **manifest_of(runner, methods),
        "metrics": {name: _about(chosen[name], metrics or ()) for name in chosen},
        "real": None if real is None else {"images": len(real), "digest": real.digest()},
        "images_per_timed_run": len(numbers),
    }
    show = progress and get_rank() == 0
    with folder.writing(manifest), _frozen():
        _meet(folder)
        for name, reason in left_out.items():
            _note(folder, f"metric {name} is left out: {reason}")
        if real is None and any(getattr(metric, "needs_base", False) for metric in chosen.values()):
            _note(folder, "without real images, metrics of sets compare with the baseline's images")
        latents = any(metric.of == "latents" for metric in chosen.values())
        _make_images(runner, methods, folder, latents, show)
        _meet(folder)
        _note_broken(folder, methods)
        _drop_without_latents(folder, chosen)
        measure_images(folder, methods, chosen, runner.device, show)
        measure_sets(folder, methods, chosen, runner.device, real, runner.size, show)
        _meet(folder)
        if rounds and get_rank() == 0:
            measure_cost(runner, methods, rounds, folder, numbers, show)
    return table(folder)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Leave what is loaded out of garbage collections: every timed run begins with one, which would
    take a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_metrics(asked: Sequence[Any] | None, left_out: Mapping[str, str]) -> None:
    """A metric that was asked for by name must work."""
    if asked is not None and left_out:
        raise ToMeError(next(iter(left_out.values())))


def _about(metric: Metric, asked: Sequence[Any]) -> dict[str, Any]:
    """What a table needs to know of a metric, and the options it was asked for with."""
    options = [
        dict(one) for one in asked if isinstance(one, Mapping) and one["name"] == metric.name
    ]
    return {
        "label": metric.label,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "options": options[-1] if options else {},
    }


def _meet(folder: RunFolder) -> None:
    """Wait for all ranks, and see what they wrote."""
    barrier()
    folder.reload()
    if not folder.manifest:
        raise ToMeError(
            f"rank {get_rank()} does not see what rank 0 wrote to {folder.path}; --work-dir must "
            "be on a file system that all machines share"
        )


def _note(folder: RunFolder, text: str) -> None:
    if get_rank() == 0 and not folder.has(kind="note", text=text):
        folder.add({"kind": "note", "text": text})


def _make_images(
    runner: Runner, methods: Sequence[Method], folder: RunFolder, latents: bool, show: bool
) -> None:
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
                output = runner.run(
                    numbers, method.steps, on_step=lambda count=count: bar.update(count)
                )
                # One process makes the first batch: the row is there once.
                if 0 in numbers and not folder.has(kind="applied", method=method.name):
                    folder.add(_applied(method, handles))
            for index, number in enumerate(numbers):
                if (method.name, number) not in done:
                    folder.add(_save(folder, runner, method, number, output, index, latents))


def _applied(method: Method, handles: Handles) -> dict[str, Any]:
    """What was merged and skipped in the first batch."""
    return {
        "kind": "applied",
        "method": method.name,
        "stats": {handle.technique: handle.stats() for handle in handles},
        "summary": "\n".join(handle.summary() for handle in handles),
    }


def _save(
    folder: RunFolder,
    runner: Runner,
    method: Method,
    number: int,
    output: Output,
    index: int,
    latents: bool,
) -> dict[str, Any]:
    """Write an image of a batch; return its row."""
    request = runner.request
    named = {"prompt": request.prompts[number], "seed": request.seed_of(number)}
    own = None if output.latents is None else output.latents[index]
    files = save_image(
        folder,
        method.slug,
        number,
        output.images[index],
        latents=own if latents else None,
        fps=runner.fps,
        text={**named, "method": method.to_dict()},
    )
    return {
        "kind": "image",
        "method": method.name,
        "number": number,
        **named,
        "negative_prompt": (request.negatives([number]) or [None])[0],
        # NaN is black in an image. Where latents cannot be seen images are taken as they are.
        "finite": own is None or bool(torch.isfinite(own).all()),
        **files,
    }


def _note_broken(folder: RunFolder, methods: Sequence[Method]) -> None:
    for method in methods:
        images = folder.find(kind="image", method=method.name)
        broken = sum(not row["finite"] for row in images)
        if broken:
            _note(folder, f"{broken} of {len(images)} images of {method.name} are not finite")


def _drop_without_latents(folder: RunFolder, metrics: dict[str, Metric]) -> None:
    """Leave out the metrics of latents where the images were made without them."""
    if all("latents" in row for row in folder.find(kind="image")):
        return
    for name in [name for name, metric in metrics.items() if metric.of == "latents"]:
        _note(folder, f"metric {name} is left out: the folder has no latents of its images")
        del metrics[name]
