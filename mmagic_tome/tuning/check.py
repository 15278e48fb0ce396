# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The winner beside the dense model on prompts that the search did not see: time and error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tqdm import tqdm

from ..evaluation.metrics.cost import spread
from ..evaluation.metrics.pixels import PSNR
from ..settings import Setting
from .folder import key_of
from .judge import Judge, mse_of, paired
from .search import psnr_of

WARM_UP_STEPS = 2
# So many pairs at least: of fewer a median says little.
LEAST_PAIRS = 5


def check(
    judge: Judge, numbers: Sequence[int], options: dict[str, Any], place: Mapping[str, Any]
) -> dict[str, Any]:
    """Run dense and a setting interleaved, on each batch of some pictures.

    Args:
        judge: whose generator and folder to use.
        numbers: of pictures that the search did not see.
        options: what :meth:`Setting.coerce` takes.
        place: what times depend on, such as the machine; pairs that were run in another are left
            alone.

    Returns:
        ``speedup`` (``median``, ``p10``, ``p90`` over the pairs, whole runs), ``pairs`` (their
        number), ``psnr`` (dB, of all pictures; None: all the same), ``psnr_of`` (of each),
        ``dense_seconds`` and ``seconds`` (medians per picture).
    """
    folder = judge.folder
    checks = folder.kept("checks.json")
    here = checks.setdefault(json.dumps(dict(place), sort_keys=True), {})
    pairs = here.setdefault(key_of(options), [])
    batches = judge.batches(numbers)
    # Prompts come round again where there are few: other times, the same pictures.
    todo = [batches[turn % len(batches)] for turn in range(max(len(batches), LEAST_PAIRS))]
    settings = {"dense": Setting(), "tuned": Setting.coerce(options)}
    generator, metric = judge.generator, PSNR()
    turns = range(len(pairs), len(todo))
    steps = 2 * generator.request.steps * len(turns)
    with tqdm(total=steps, desc="unseen prompts", unit="step", dynamic_ncols=True) as bar:
        for setting in settings.values() if turns else ():
            with setting.apply(generator.model):
                generator.run(todo[0], min(WARM_UP_STEPS, generator.request.steps))
        for turn in turns:
            images, seconds = {}, {}
            for name in list(settings)[:: -1 if turn % 2 else 1]:
                with settings[name].apply(generator.model):
                    images[name], clock = generator.run(todo[turn], on_step=bar.update)
                seconds[name] = clock.total
            values = paired(metric, images["dense"], images["tuned"])
            psnrs = [None if math.isinf(value) else value for value in values]
            pairs.append({**seconds, "psnr": psnrs, "pictures": len(todo[turn])})
            folder.keep("checks.json", checks)
    return summary(pairs, len(batches))


def summary(pairs: Sequence[dict[str, Any]], batches: int) -> dict[str, Any]:
    """What :func:`check` returns, of its pairs; pictures of the first ``batches`` count once."""
    values = [value for pair in pairs[:batches] for value in pair["psnr"]]
    mse = mse_of([math.inf if value is None else value for value in values])
    return {
        "speedup": spread(pair["dense"] / pair["tuned"] for pair in pairs),
        "pairs": len(pairs),
        "psnr": None if mse == 0 else psnr_of(mse),
        "psnr_of": values,
        "dense_seconds": median(pair["dense"] / pair["pictures"] for pair in pairs),
        "seconds": median(pair["tuned"] / pair["pictures"] for pair in pairs),
    }
