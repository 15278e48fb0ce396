# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluates methods: images of the same prompts and seeds, metrics, cost.

Each stage looks for its rows in the folder and does what is missing, so that a run that was killed
goes on, and methods, metrics and rounds can be added. Images are made in fixed batches: the lowest
bits of a sum may depend on the batch, so a batch of which an image is missing is run as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from mmengine.dist import barrier, get_rank

from ..errors import ToMeError
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
from .settings import Handles
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
    """Evaluate methods against the baseline, which is always one of them.

    Args:
        source: What is run.
        request: The images.
        methods: What is applied, one after the other.
        metrics: Names, or dicts of a name and options. Default: None, those that need no download,
            of which one that cannot be computed here is left out with a note.
        rounds: Interleaved rounds in which time is measured; 0 leaves out time, memory and FLOPs.
        folder: Of the run; what it has already is not done again.
        device: Where to run.
        dtype: Of the model. Default: None, the source's.
        real: Images for metrics of sets. Default: None, these compare with the baseline's.
        cost_batch_size: Images per run that is timed. Default: None, ``request.batch_size``.
        progress: Whether to show bars.

    Returns:
        pandas.DataFrame: See :func:`~.table.table`; on ranks other than 0 without the cost.

    Raises:
        ToMeError: Whatever cannot work, before images are made wherever that can be told; the
            folder is of another run.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    methods = [BASELINE, *(one for one in methods if one.name != BASELINE.name)]
    check_names(methods)
    source.check(request)
    chosen, left_out = _choose(metrics, request)
    held = folder.manifest
    if held:
        # Sums in another order differ in their last bits.
        torch.set_num_threads(held["threads"])
    runner = source.load(request, device, dtype)
    for method in methods:
        with method.on(runner.model):
            pass  # fails here, and not after hours
    for name, metric in list(chosen.items()):
        try:
            metric.check(runner.size)
        except ToMeError as error:
            left_out[name] = str(error)
            del chosen[name]
    if metrics is not None and left_out:
        raise ToMeError(next(iter(left_out.values())))
    manifest = {
        **manifest_of(runner, methods),
        "command": "evaluate",
        "metrics": {name: _about(metric) for name, metric in chosen.items()},
        "metric_options": ...
        "real": None if real is None else {"images": len(real), "digest": real.digest()},
        "cost_batch_size": len(request.batches()[0][:cost_batch_size]),
    }
    show = progress and get_rank() == 0
    with folder.writing(manifest):
        _meet(folder)
        for name, reason in left_out.items():
            _note(folder, f"metric {name} is left out: {reason}")
        _make_images(runner, methods, folder, show)
        _meet(folder)
        chosen = _without_latents(folder, chosen)
        measure_images(folder, methods, chosen, runner.device, show)
        measure_sets(folder, methods, chosen, runner.device, real, runner.size, show)
        _meet(folder)
        if rounds and get_rank() == 0:
            numbers = request.batches()[0][:cost_batch_size]
            measure_cost(runner, methods, rounds, folder, numbers, show)
    return table(folder)


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


# --- images ---------------------------------------------------------------------------------------


def _make_images(
    runner: Runner, methods: Sequence[Method], folder: RunFolder, latents: bool, progress: bool
) -> None:
    request = runner.request
    done = {
        (row["method"], row["number"])
        for row in folder.find(kind="image")
        if (folder.path / row["file"]).is_file()
    }
    # Batches of all methods in one row, so that no rank waits between methods.
    missing = [
        (place, numbers)
        for place, method in enumerate(methods)
        for numbers in request.batches()
        if any((method.name, number) not in done for number in numbers)
    ]
    mine = _share(missing)
    # Steps, not images: with half of the steps an image takes half of the time.
    steps = sum((methods[place].steps or runner.steps) * len(numbers) for place, numbers in mine)
    with progress_bar(steps, "generating", show=progress) as bar:
        for place, numbers in mine:
            method, count = methods[place], len(numbers)
            bar.set_postfix_str(method.name)
            with method.on(runner.model) as handles:
                output = runner.run(
                    numbers, method.steps, on_step=lambda count=count: bar.update(count)
                )
                if 0 in numbers and not folder.has(kind="applied", method=method.name):
                    folder.add(applied_row(method, handles))
            for index, number in enumerate(numbers):
                if (method.name, number) not in done:
                    folder.add(_save(runner, method, folder, number, output, index, latents))
