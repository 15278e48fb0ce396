# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Finds the tolerance of step caching for a speed-up or a PSNR.

A bisection over the logarithm of the tolerance, on some of the prompts. What it finds is checked on
the others, beside fewer steps. Both are evaluations, so an interrupted run goes on with what it
lacks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ToMeError
from ..settings import Setting
from ..validate import check_integer, check_number
from .cost import default_rounds
from .evaluate import evaluate_runner
from .files import write_text
from .infer import METRICS
from .methods import Method, fewer_steps
from .metrics import paired
from .plan import DEFAULT_FEWER_STEPS
from .prompts import spread
from .report import write_report
from .request import Request
from .results import RunFolder
from .runners import Source, open_source, runner_of
from .runners.mmagic_source import load_config
from .table import speedup_text

LOW, HIGH, PROBES = 0.001, 0.5, 6  # of tolerances, and how many are tried
SAME = 0.98  # speed-ups that differ less count as equal
CONFIGS = (".py", ".json", ".yaml", ".yml")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """What is asked for."""

    #: 'speedup': of the whole run, by the median. 'psnr_p5': PSNR to the baseline's images, that of
    #: all but the worst 5 % (of 20 or fewer images: of all).
    key: str
    value: float  #: above 1; in dB, above 0

    def __post_init__(self) -> None:
        low, instead = {"speedup": (1, 1.5), "psnr_p5": (0, 45)}[self.key]
        check_number("tune: ", self.option, self.value, low, math.inf, instead, open_low=True)

    @property
    def option(self) -> str:
        """Name of the command's option."""
        return self.key.partition("_")[0]

    def __str__(self) -> str:
        return f"{self.option} {self.value:g}"

    def meets(self, row: Row) -> bool:
        """Whether a measurement, with ``speedup`` and ``psnr_p5``, reaches the target."""
        return row[self.key] >= self.value

    def best(self, rows: Sequence[Row]) -> Row:
        """Of those that meet the target the best in the other quantity; else the closest to it. Of
        two that are about as fast the one that is closer to the baseline."""
        met = [row for row in rows if self.meets(row)]
        left = met or rows
        if bool(met) == (self.key == "psnr_p5"):  # speed-up decides
            least = SAME * max(row["speedup"] for row in left)
            left = [row for row in left if row["speedup"] >= least]
        return max(left, key=lambda row: row["psnr_p5"])


def search(measure: Callable[[float], Row], target: Target) -> list[Row]:
    """Measure at most six tolerances: by bisection for the smallest that is fast enough (as fast as
    the largest, if that is not), or the largest that is close enough.

    It assumes that speed and error rise with the tolerance, which is so but for noise and for the
    largest tolerances: choose from all that it returns.
    """
    low, high, smallest = LOW, HIGH, target.key == "speedup"
    rows = [measure(high)]
    goal = min(target.value, SAME * rows[0]["speedup"]) if smallest else target.value
    while len(rows) < PROBES and (smallest or rows[0]["psnr_p5"] < goal):
        middle = float(f"{math.sqrt(low * high):.2g}")  # as a user would write it
        rows.append(measure(middle))
        low, high = (low, middle) if (rows[-1][target.key] >= goal) == smallest else (middle, high)
    return rows


def split(request: Request, limit: int) -> dict[str, Request]:
    """What to search with and what to check with, ``limit`` images in all: no prompt is in both."""
    numbers = spread(range(len(request)), limit)
    texts = list(dict.fromkeys(request.prompts[number] for number in numbers))
    if len(texts) < 2:
        raise ToMeError("tune searches with some prompts and checks with others; state two or more")
    parts = {}
    for part, chosen in (("search", texts[::2]), ("check", texts[1::2])):
        own = [number for number in numbers if request.prompts[number] in chosen]
        parts[part] = request.part(own)
    return parts


def check(source: Source, request: Request, cfg_options: Mapping[str, Any] | None = None) -> None:
    """Raise ToMeError for what cannot be tuned; nothing is loaded."""
    if source.path.endswith(CONFIGS):
        open_source(_config(source, request, HIGH, cfg_options))  # which has no other cache_cfg
    source.check(request)
    if request.steps is not None and request.steps < 5:
        raise ToMeError(f"{request.steps} steps are too few for step caching; write --steps 20")


def tune(
    source: Source,
    request: Request,
    target: Target,
    *,
    limit: int = 12,
    rounds: int | None = None,
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Find a tolerance for a speed-up or a PSNR; print, and write a config and a report. What the
    source's config merges is merged.

    Args:
        limit: Images at most; half of them search, the others check.
        folder: Where files go; what is there is not run again.
        cfg_options: What was changed of the source's config, to be repeated in the new one.
        rounds: Interleaved rounds per setting. Default: None, five or more.
        source, request, device, dtype, progress: See :func:`~.evaluate.evaluate`.

    Returns:
        dict: ``tolerance``; ``met``, whether the check reaches the target; ``config``, the path of
        the new config; ``table``, that of the check.

    Raises:
        ToMeError: See :func:`check`; fewer than five steps; images that are not finite.
    """
    check(source, request, cfg_options)
    if rounds is not None:
        check_integer("", "rounds", rounds, 1)
    folder, parts = Path(folder), split(request, limit)
    runner = source.load(parts["search"], device, dtype)
    check(source, replace(request, steps=runner.steps), cfg_options)  # those of the model's class

    def measure(part: str, tolerances: Sequence[float], others: Sequence[Method] = ()) -> list[Row]:
        """The rows of these tolerances."""
        own = Setting(source.setting.tome)
        settings = [own.replace(cache={"tolerance": one}) for one in tolerances]
        methods = [Method(f"tolerance {x:g}", one) for x, one in zip(tolerances, settings)]
        one = runner_of(runner.model, parts[part], source)
        how = {"memory": False, "command": "tune", "progress": progress}
        count = rounds or default_rounds(parts[part])
        frame = evaluate_runner(one, [*methods, *others], METRICS, count, folder / part, **how)
        found = frame.set_index("method", drop=False).to_dict("index")
        rows = []
        for tolerance, method in zip(tolerances, methods):
            row = {**found[method.name], "tolerance": tolerance}
            if row["images"] < len(one.request):
                raise ToMeError(f"{method.name}: images are not finite; try another --dtype")
            print(f"{part:6}  {_text(row)}", flush=True)
            rows.append(row)
        return rows

    with RunFolder(folder).writing({"command": "tune"}):
        tried = search(lambda tolerance: measure("search", [tolerance])[0], target)
        found = target.best(tried)
        if not target.meets(found):
            print(f"{target} is out of reach; the check is of what comes closest")
        # A setting with more to spare, where the check misses the target.
        further = [one for one in tried if one[target.key] > found[target.key]]
        chosen = [found["tolerance"], *([target.best(further)["tolerance"]] if further else [])]
        rows = measure("check", chosen, fewer_steps(DEFAULT_FEWER_STEPS, runner.steps))
    row = rows[0] if target.meets(rows[0]) or not target.meets(found) else target.best(rows)
    met, report = target.meets(row), write_report(RunFolder(folder / "check"))
    config = write_config(folder, source, request, row["tolerance"], cfg_options)
    print(f"\n{target} is {'met' if met else 'missed'}: {_text(row)}")
    print(f"Beside fewer steps: {report}\nConfig: {config}")
    return {"tolerance": row["tolerance"], "met": met, "config": config, "table": rows}


def _text(row: Row) -> str:
    psnr = paired("psnr")
    words = [psnr.text(row["psnr"]), f"worst 5 % {psnr.text(row['psnr_p5'])}"]
    return f"{row['method']}: {speedup_text(row)}, PSNR {', '.join(words)}"


def _config(source: Source, request: Request, tolerance: float, cfg_options: Any = None) -> Any:
    """The source's config with a tolerance and the request's steps, guidance and size."""
    config = load_config(source.path)
    config.merge_from_dict(dict(cfg_options or {}))
    config.cache_cfg = {"tolerance": tolerance}
    if getattr(source, "checkpoint", ""):
        config.load_from = os.path.abspath(source.checkpoint)
    imports = config.get("custom_imports", {}).get("imports", [])
    imports = [imports] if isinstance(imports, str) else imports
    config.custom_imports = {"imports": sorted({*imports, "mmagic_tome"})}
    of = {key: getattr(request, key) for key in ("steps", "guidance", "size")}
    stated = {key: value for key, value in of.items() if value is not None}
    config.infer_cfg = {**config.get("infer_cfg", {}), **stated}
    return config


def write_config(
    folder: Path, source: Source, request: Request, tolerance: float, cfg_options: Any = None
) -> Path:
    """Write the source's config with a tolerance; of a pipeline a Python file."""
    if source.path.endswith(CONFIGS):
        text = _config(source, request, tolerance, cfg_options).pretty_text
    else:
        lines = ["import mmagic_tome", "import diffusers", ""]
        lines += [f"pipeline = diffusers.{source.class_name}.from_pretrained({source.path!r})"]
        lines += [f"mmagic_tome.apply_cache(pipeline, tolerance={tolerance})"]
        text = "\n".join([*lines, ""])
    path = folder / f"{source.name}_tuned.py"
    write_text(path, text)
    return path
