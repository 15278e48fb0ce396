# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How good the pictures are: every metric over every contender, kept per picture.

What is kept belongs to the pixels that it was computed from, by their hashes. So a metric can
be added to an evaluation that is finished, and a picture that was made again is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..contenders import parse_options
from ..errors import ToMeError
from .contenders import DENSE, Contender
from .metrics import PAIRED, SETS, PairedMetric, SetMetric, build_paired, build_set
from .real import RealPictures
from .store import RunFolder
from .team import Team

# Pictures per file of kept values. A value does not depend on it.
CHUNK = 64
REAL = "real"


@dataclass
class Metrics:
    """The metrics of an evaluation.

    Args:
        named: Name to metric, in the order of the report.
        options: Name to the options that the metric was made with.
        skipped: Name to the reason why a metric of the defaults is left out.
    """

    named: dict[str, PairedMetric | SetMetric]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def sets(self) -> dict[str, SetMetric]:
        """Return those that judge sets of pictures."""
        return {name: m for name, m in self.named.items() if isinstance(m, SetMetric)}


def default_names() -> list[str]:
    """Return the metrics of an evaluation that names none: those that need no download."""
    names = ["psnr", "ssim", "ms_ssim"]
    shipped = ["efficientnet_lite0_distance", "frechet_efficientnet_lite0"]
    return [*names, "latent_error", *shipped]


def build_metrics(asked, device, pictures: int, size: tuple[int, int] | None) -> Metrics:
    """Make the metrics and try each on one picture, before any model is loaded.

    Args:
        asked: Names, ``NAME={...}`` with options of the metric, or dicts with ``name`` and
            options; None for :func:`default_names`.
        device: Where to compute.
        pictures: How many pictures every contender will make.
        size: (height, width) of the pictures in pixels, None if only the model tells.

    Returns:
        The metrics. One that was asked for by name must work; of the defaults, what cannot
        work here is left out with its reason.

    Raises:
        ToMeError: An unknown metric, weights that are not there, too few or too small pictures.
    """
    metrics = Metrics({})
    for entry in default_names() if asked is None else asked:
        name, options = _name_and_options(entry)
        try:
            metrics.named[name] = _build(name, options, device, pictures, size)
            metrics.options[name] = options
        except ToMeError as error:
            if asked is not None:
                raise
            metrics.skipped[name] = " ".join(str(error).split())
    return metrics


def _name_and_options(entry) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        name, _, text = entry.partition("=")
        options = parse_options(text) if text else {}
    elif isinstance(entry, Mapping) and "name" in entry:
        options = dict(entry)
        name = options.pop("name")
    else:
        name, options = str(entry), None
    if not isinstance(options, Mapping):
        raise ToMeError(f"metric {entry!r}: write its name, or NAME='{{\"option\": value}}'")
    return name, dict(options)


def _build(name, options, device, pictures, size) -> PairedMetric | SetMetric:
    known = [*PAIRED, *SETS]
    if name not in known:
        raise ToMeError(f"unknown metric {name!r}; there are {', '.join(known)}")
    build = build_paired if name in PAIRED else build_set
    metric = build(name, **{"device": str(device), **options})
    if isinstance(metric, SetMetric) and pictures < metric.min_samples:
        raise ToMeError(
            f"{metric.label} needs at least {metric.min_samples} pictures, and there are "
            f"{pictures}; generate more, or leave this metric out"
        )
    if size is not None and getattr(metric, "of", "pictures") == "pictures":
        noise = torch.Generator().manual_seed(0)
        probe = torch.randint(0, 256, (1, 3, *size), generator=noise, dtype=torch.uint8)
        if isinstance(metric, SetMetric):
            metric.features(probe, ["a picture"] if metric.needs_prompts else None)
        else:
            metric(probe, probe)
    return metric


class Measurer:
    """Computes metrics over the pictures of a folder, and keeps what it computed there.

    Args:
        folder: The folder, with all pictures made.
        contenders: All of them, dense included.
        metrics: The metrics.
        prompts: Text of every picture.
        real: Real pictures for metrics of sets, or None: then these compare with the dense set.
    """

    def __init__(
        self,
        folder: RunFolder,
        contenders: Sequence[Contender],
        metrics: Metrics,
        prompts: Sequence[str],
        real: RealPictures | None,
    ) -> None:
        self.folder, self.contenders, self.metrics = folder, contenders, metrics
        self.prompts, self.real = prompts, real
        self._all_jobs: dict[str, list[Job]] = {}
        # (name of the folder, number) -> record; all of them are read once.
        self.records = {
            (contender.folder, number): folder.record(contender.folder, number)
            for contender in contenders
            for number in range(len(prompts))
        }

    def good(self, contender: str) -> list[int]:
        """Return the pictures of a contender's folder that are pictures: no NaN, no infinity."""
        count = len(self.prompts)
        return [n for n in range(count) if self.records[contender, n]["finite"]]

    # --- work ---------------------------------------------------------------------------------

    def run(self, team: Team) -> None:
        """Compute this rank's share of all metrics."""
        jobs = [job for name in self.metrics.named for job in self._jobs(name)]
        missing = [place for place, job in enumerate(jobs) if self._kept(job) is None]
        mine = [jobs[place] for place in team.share(team.first(missing))]
        pictures = sum(len(job.numbers) for job in mine)
        with tqdm(
            total=pictures,
            desc="measuring",
            unit="picture",
            dynamic_ncols=True,
            disable=team.rank != 0,
            mininterval=team.bar_interval,
        ) as bar:
            for job in mine:
                bar.set_postfix_str(f"{job.metric} of {job.contender}")
                arrays = {"numbers": np.array(job.numbers), "values": self._compute(job)}
                self.folder.save_measure(job.metric, job.contender, job.chunk, job.key, arrays)
                bar.update(len(job.numbers))

    def _jobs(self, name: str) -> list[Job]:
        """Return the work for a metric over all contenders, done or not."""
        if name not in self._all_jobs:
            self._all_jobs[name] = self._find_jobs(name)
        return self._all_jobs[name]

    def _find_jobs(self, name: str) -> list[Job]:
        metric = self.metrics.named[name]
        folders = [contender.folder for contender in self.contenders]
        if isinstance(metric, SetMetric):
            # A metric of real pictures that needs none of them has no use for their features.
            if self.real is not None and metric.needs_real:
                folders = [*folders, REAL]
        else:
            folders = folders[1:]  # dense pictures are what the others are compared with
        jobs = []
        for folder in folders:
            total = len(self.real) if folder == REAL else len(self.prompts)
            good = range(total) if folder == REAL else self.good(folder)
            if not isinstance(metric, SetMetric):
                good = sorted(set(good) & set(self.good(DENSE)))
            for first in range(0, total, CHUNK):
                numbers = [n for n in good if first <= n < first + CHUNK]
                if numbers:
                    key = self._key(name, folder, numbers)
                    jobs.append(Job(name, folder, first // CHUNK, numbers, key))
        return jobs

    def _key(self, name: str, folder: str, numbers) -> str:
        """Hash of everything that the values of a chunk are computed from."""
        metric = self.metrics.named[name]
        basis: list[Any] = [name, self.metrics.options[name], numbers]
        if folder == REAL:
            basis += [self.real.digest, list(self.real.size)]
        else:
            folders = [folder] if isinstance(metric, SetMetric) else [DENSE, folder]
            basis += [self.records[f, n]["sha256"] for f in folders for n in numbers]
            if isinstance(metric, SetMetric) and metric.needs_prompts:
                basis += [self.prompts[n] for n in numbers]
        return hashlib.sha256(json.dumps(basis, default=str).encode()).hexdigest()

    def _kept(self, job: Job) -> np.ndarray | None:
        found = self.folder.measure(job.metric, job.contender, job.chunk, job.key)
        return None if found is None else found["values"]

    def _compute(self, job: Job) -> np.ndarray:
        metric = self.metrics.named[job.metric]
        if not isinstance(metric, SetMetric) and metric.of == "latents":
            return self._of_latents(job, metric)
        values = []
        for number in job.numbers:
            if job.contender == REAL:
                picture = _tensor(self.real.picture(number))
            else:
                picture = _tensor(np.asarray(self.folder.picture(job.contender, number)))
            if isinstance(metric, SetMetric):
                text = [self.prompts[number]] if metric.needs_prompts else None
                values.append(metric.features(picture, text))
            else:
                dense = _tensor(np.asarray(self.folder.picture(DENSE, number)))
                values.append(metric(dense, picture))
        return torch.cat(values).cpu().numpy()

    def _of_latents(self, job: Job, metric: PairedMetric) -> np.ndarray:
        values = []
        for number in job.numbers:
            pair = [self.folder.latents(f, number) for f in (DENSE, job.contender)]
            if any(latents is None for latents in pair):
                raise ToMeError(
                    "the final latents of this model cannot be seen; leave out the metric "
                    f"{job.metric}"
                )
            values.append(metric(*(torch.from_numpy(p)[None] for p in pair)))
        return torch.cat(values).double().cpu().numpy()

    # --- results ------------------------------------------------------------------------------

    def values(self, name: str, folder: str) -> tuple[list[int], torch.Tensor]:
        """Return numbers of pictures and what was computed of each, in order.

        Args:
            name: Of the metric.
            folder: Of the contender, or ``'real'``.

        Returns:
            N numbers, and a tensor (N,) of paired values or (N, D) of features.
        """
        numbers, parts = [], []
        for job in self._jobs(name):
            if job.contender == folder:
                kept = self._kept(job)
                if kept is None:
                    raise RuntimeError(f"{name} of {folder}, chunk {job.chunk} was not computed")
                numbers += job.numbers
                parts.append(torch.from_numpy(kept))
        return numbers, torch.cat(parts) if parts else torch.empty(0)

    def results(self, contender: Contender) -> dict[str, dict[str, Any]]:
        """Return what every metric says about a contender, JSON-able.

        Each has ``label``, ``higher_is_better``, ``reference`` (what it compares with), ``n``
        (pictures it is of), ``value`` and ``text``; or ``skipped`` with the reason why there
        is no value. Paired ones have their ``spread`` over pictures. ``value`` is None with
        the text "identical" where it is infinite.
        """
        report = {}
        for name, metric in self.metrics.named.items():
            if isinstance(metric, SetMetric):
                report[name] = self._set_result(name, metric, contender)
            else:
                report[name] = self._paired_result(name, metric, contender)
        return report

    def _paired_result(self, name, metric, contender) -> dict[str, Any]:
        result = {
            "label": metric.label,
            "kind": "paired",
            "higher_is_better": metric.higher_is_better,
            "unit": metric.unit,
            "reference": "dense",
        }
        if contender.kind == DENSE:
            return {**result, "skipped": "dense is what others are compared with"}
        numbers, values = self.values(name, contender.folder)
        if not numbers:
            return {**result, "skipped": "no pair of pictures without NaN"}
        value = metric.mean(values)
        finite = values[values.isfinite()]
        spread = None
        if len(finite):
            p10, median, p90 = np.percentile(finite.numpy(), [10, 50, 90]).tolist()
            spread = {"p10": p10, "median": median, "p90": p90}
        return {
            **result,
            "n": len(numbers),
            "value": value if math.isfinite(value) else None,
            "text": metric.text(value),
            "spread": spread,
            "identical": int((~values.isfinite()).sum()),
        }

    def _set_result(self, name, metric, contender) -> dict[str, Any]:
        against_real = self.real is not None and metric.needs_real
        reference = "real pictures" if against_real else "dense set" if metric.needs_real else None
        result = {
            "label": metric.label,
            "kind": "set",
            "higher_is_better": metric.higher_is_better,
            "unit": "",
            "reference": reference,
        }
        if metric.needs_real and not against_real and contender.kind == DENSE:
            return {**result, "skipped": "the dense set is the reference"}
        numbers, features = self.values(name, contender.folder)
        others = None
        if metric.needs_real:
            _, others = self.values(name, REAL if against_real else DENSE)
        try:
            found = metric.compute(features, others)
        except ToMeError as error:
            return {**result, "skipped": str(error)}
        first = next(iter(found))
        return {
            **result,
            "n": len(numbers),
            "value": found[first],
            "text": metric.text(found[first]),
            "others": {key: value for key, value in found.items() if key != first},
        }


@dataclass(frozen=True)
class Job:
    """A metric over a chunk of pictures of a contender."""

    metric: str
    contender: str
    chunk: int
    numbers: list[int]
    key: str


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """(height, width, 3) uint8 -> (1, 3, height, width)."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
