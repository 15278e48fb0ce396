# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Finds the tolerance of step caching, and a merging ratio, for a speed-up or a PSNR.

A bisection over the logarithm of the tolerance, on some of the prompts. What it finds is checked on
the others, beside fewer steps that take as long. Each setting is measured by :func:`~.infer.infer`
in a folder of its own, so an interrupted run goes on with the settings that it lacks.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from mmengine.config import Config

from ..errors import ToMeError
from ..settings import Setting
from ..validate import check_number
from . import plots
from .evaluate import request_digest, weights_digest
from .files import write_text
from .infer import WARM_UP_STEPS, infer
from .methods import Method, fewer_steps
from .metrics import paired
from .prompts import spread
from .report import save_record
from .request import INPUTS, Request
from .results import RunFolder
from .runners import Runner, Source, open_source, runner_of
from .runners.mmagic_source import load_config

LOW, HIGH, PROBES = 0.001, 0.5, 6  # of tolerances, and how many are tried
RATIOS, MANY_TOKENS, MERGING_PROBES = (0.25, 0.5), 4096, 3  # merging, from so many tokens on
SAME = 0.98  # speed-ups that differ less count as equal
FEWER = (0.8, 0.5)  # shares of the steps, for the plot's line
CONFIGS = (".py", ".json", ".yaml", ".yml")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """What is asked for."""

    #: 'speedup': of the whole run, by the median. 'psnr': to the baseline's images, that of all but
    #: the worst 5 % (of 20 or fewer images: of all).
    key: str
    value: float  #: above 1; in dB, above 0

    def __post_init__(self) -> None:
        low, instead = {"speedup": (1, 1.5), "psnr": (0, 45)}[self.key]
        check_number("tune: ", self.key, self.value, low, math.inf, instead, open_low=True)

    def __str__(self) -> str:
        return f"{self.key} {self.value:g}"

    def meets(self, row: Row) -> bool:
        """Whether a measurement, with ``speedup`` and ``psnr``, reaches the target."""
        return row[self.key] >= self.value

    def best(self, rows: Sequence[Row]) -> Row:
        """Of those that meet the target the best in the other quantity; else the closest to it. Of
        two that are about as fast the one that is closer to the baseline."""
        met = [row for row in rows if self.meets(row)]
        left = met or rows
        if bool(met) == (self.key == "psnr"):  # speed-up decides
            least = SAME * max(row["speedup"] for row in left)
            left = [row for row in left if row["speedup"] >= least]
        return max(left, key=lambda row: row["psnr"])


def search(
    measure: Callable[[float], Row], target: Target, high: float = HIGH, probes: int = PROBES
) -> list[Row]:
    """Measure at most ``probes`` tolerances up to ``high``: by bisection for the smallest that is
    fast enough (as fast as ``high``, if that is not), or the largest that is close enough.

    It assumes that speed and error rise with the tolerance, which is so but for noise and for the
    largest tolerances: choose from all that it returns.
    """
    rows, low, smallest = [measure(high)], LOW, target.key == "speedup"
    goal = min(target.value, SAME * rows[0]["speedup"]) if smallest else target.value
    while len(rows) < probes and (smallest or rows[0]["psnr"] < goal):
        middle = float(f"{math.sqrt(low * high):.2g}")  # as a user would write it
        if middle in (low, high):
            break
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
        given: dict[str, Any] = {kind: request.inputs(kind, own) for kind in INPUTS}
        given["prompts"] = [request.prompts[number] for number in own]
        given["seed"] = [request.seed_of(number) for number in own]
        parts[part] = replace(request, negative_prompt=request.negatives(own), **given)
    return parts


def check(source: Source, request: Request, cfg_options: Mapping[str, Any] | None = None) -> None:
    """Raise ToMeError for what cannot be tuned; nothing is loaded."""
    source.check(request)
    if request.steps is not None and request.steps < 5:
        raise ToMeError(f"{request.steps} steps are too few for step caching; write --steps 20")
    setting = Setting(source.setting.tome).replace(cache={"tolerance": HIGH})
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(Path(folder), source, request, setting, cfg_options)
        if source.path.endswith(CONFIGS) and open_source(path).setting != setting:
            raise ToMeError(f"{source.path} does not take a cache_cfg at its top level")


def tune(
    source: Source,
    request: Request,
    target: Target,
    *,
    ratios: Sequence[float] | None = None,
    limit: int = 12,
    rounds: int | None = None,
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Find a setting for a speed-up or a PSNR; print, and write its config, a table and a plot.

    Args:
        ratios: Of merging, to try with proportional attention. Default: None, 0.25 and 0.5 if the
            finest level has 4096 tokens and the config itself does not merge.
        limit: Images at most; half of them search, the others check.
        folder: Where files go; settings that were measured there are not run again.
        cfg_options: What was changed of the source's config, to be repeated in the new one.
        source, request, rounds, device, dtype, progress: See :func:`~.infer.infer`.

    Returns:
        dict: ``setting``; ``met``, whether the check reaches the target; ``config``, the path of
        the new config; ``table``, a DataFrame.
    """
    check(source, request, cfg_options)
    folder, parts = Path(folder), split(request, limit)
    runner = source.load(parts["search"], device, dtype)
    check(source, replace(request, steps=runner.steps), cfg_options)  # those of the model's class
    loaded, own, rows = copy.copy(source), Setting(source.setting.tome), []
    loaded.load = lambda request, *_: runner_of(runner.model, request, loaded)
    how = {"rounds": rounds, "device": device, "dtype": dtype, "progress": progress}

    def measure(part: str, method: Method) -> Row:
        path = folder / part / method.slug
        if not (path / "results.json").exists():
            with contextlib.redirect_stdout(io.StringIO()):
                infer(loaded, parts[part], method, compare=True, folder=path, **how)
        rows.append({"part": part, "method": method.name, **_read(path / "results.json")})
        print("{part:6}  {method:26}  {text}".format(**rows[-1]), flush=True)
        return rows[-1]

    def method(tolerance: float, ratio: float | None = None) -> Method:
        merging = {} if ratio is None else {"ratio": ratio, "prop_attn": True}
        name = f"tolerance {tolerance:g}" + (f", ratio {ratio:g}" if merging else "")
        methods[name] = Method(name, own.replace(cache={"tolerance": tolerance}, **merging))
        return methods[name]

    def equal_steps(speedup: float) -> int:  # of the baseline; not all that takes time is a step
        rest = row["baseline_seconds"] - row["network_seconds"]
        part = (row["baseline_seconds"] / speedup - rest) / row["network_seconds"]
        return min(max(round(runner.steps * part), 1), runner.steps - 1)

    methods: dict[str, Method] = {}
    for one in (None, *(ratios or ())):
        with method(HIGH, one).on(runner.model):
            pass  # what cannot be applied fails here
    settings = runner.settings | {
        part: [*zip(one.prompts, one.seed)] for part, one in parts.items()
    }
    settings |= {"images": request_digest(request), "weights": weights_digest(runner.model)}
    settings |= {"setting": [str(own.tome), request.batch_size, str(dict(request.extra))]}
    with RunFolder(folder).writing({"command": "tune", **settings}):
        found = target.best(search(lambda x: measure("search", method(x)), target))
        if ratios is None:
            ratios = RATIOS if own.tome is None and _many_tokens(runner) else ()
        most = methods[found["method"]].setting.cache[0].tolerance if target.meets(found) else HIGH
        for one in ratios:
            search(lambda x, y=one: measure("search", method(x, y)), target, most, MERGING_PROBES)
        found = target.best(rows)
        further = [one for one in rows if one[target.key] > found[target.key]]
        if not target.meets(found):
            print(f"{target} is out of reach; the check is of what comes closest")
        row = measure("check", methods[found["method"]])
        if target.meets(found) and not target.meets(row) and further:
            print(f"the check misses {target}; next is a setting with more to spare")
            row = target.best([row, measure("check", methods[target.best(further)["method"]])])
        met, equal = target.meets(row), equal_steps(row["speedup"])
        asked = equal if met or target.key == "psnr" else equal_steps(target.value)
        others = fewer_steps([equal, asked, *FEWER], runner.steps)
        fewer = {one.steps: measure("check", one) for one in others}[asked]
    chosen = methods[row["method"]].setting
    config = write_config(folder, source, request, chosen, cfg_options)
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "results.csv", index=False)
    save_record(folder / "results.json", {**settings, target.key: target.value}, rows)
    plots.save(_plot(frame, row), folder / "tune.png")
    print(f"\n{target} is {'met' if met else 'missed'}: {row['method']}, {row['text']}")
    side = "further from" if fewer["psnr_mean"] < row["psnr_mean"] else "closer to"
    print(f"instead of it {fewer['method']}: {fewer['text']}, {side} the baseline")
    print(f"Table, plot, images: {folder}\nConfig: {config}")
    return {"setting": chosen, "met": met, "config": config, "table": frame}


def _many_tokens(runner: Runner) -> bool:
    """Whether merging may pay: the finest level that can merge has many tokens."""
    merging = Setting.coerce({"ratio": RATIOS[0], "prop_attn": True})
    try:
        with Method("merging", merging).on(runner.model) as handles:
            runner.run([0], min(WARM_UP_STEPS, runner.steps))
            return any((row["tokens"] or 0) >= MANY_TOKENS for row in handles.tome.stats())
    except ToMeError:  # nothing to merge, or no proportional attention
        return False


def _read(path: Path) -> dict[str, Any]:
    """The figures of what ``infer`` has measured; ``psnr`` is what 5 % of the images miss."""
    result, psnr = json.loads(path.read_text(encoding="utf-8")), paired("psnr")
    images, base = result["images"], result["seconds_per_image"]["baseline"]
    if any(math.isnan(one["latent_error"] or 0) for one in images):
        raise ToMeError(f"{path.parent}: images are not finite; try another --dtype")
    values = [math.inf if one["psnr"] is None else one["psnr"] for one in images]
    found = psnr.figures(values)
    worst, mean = found["psnr_p5"], found["psnr"]
    return {
        "kind": "fewer steps" if result["method"]["steps"] else result["method"]["label"],
        **{"images": len(values), "psnr": worst, "psnr_mean": mean},
        "speedup": result["speedup"]["median"],
        **{f"speedup_{key}": result["speedup"][key] for key in ("low", "high", "count")},
        "baseline_seconds": median(base["whole"]),
        "network_seconds": median(base["network"]),  # of the baseline
        "text": f"{result['speedup']['text']}, PSNR {psnr.text(mean)}, worst {psnr.text(worst)}",
    }


def _plot(frame: pd.DataFrame, chosen: Row) -> Any:
    """PSNR against speed-up, in the search and in the check, with fewer steps as a line."""
    keys, panels = ["method", "kind", "speedup", "psnr", "speedup_low", "speedup_high"], {}
    for (part, images), group in frame.groupby(["part", "images"], sort=False):
        points = [plots.Point(*values) for values in group[keys].itertuples(index=False)]
        panels[f"{part}, {images} images"] = points
    figure = plots.fidelity(panels, "PSNR to the baseline, worst 5 % (dB)")
    axes, line = figure.axes[-1], frame[frame["kind"] == "fewer steps"].sort_values("speedup")
    axes.plot(line["speedup"], line["psnr"], color=plots.KINDS["fewer steps"][0], linewidth=1)
    axes.plot(chosen["speedup"], chosen["psnr"], "ko", markersize=16, fillstyle="none")
    return figure


def write_config(
    folder: Path, source: Source, request: Request, setting: Setting, cfg_options: Any = None
) -> Path:
    """Write a config with a setting, on the base of the source's; of a pipeline a Python file."""
    values: dict[str, Any] = {"cache_cfg": {"tolerance": setting.cache[0].tolerance}}
    if setting.tome != source.setting.tome:
        values["tome_cfg"] = {"ratio": setting.tome.ratio, "prop_attn": setting.tome.prop_attn}
    if source.path.endswith(CONFIGS):
        base, config = load_config(source.path), Config()
        if "cache_cfg" in base:
            values["cache_cfg"]["_delete_"] = True
        if getattr(source, "checkpoint", ""):
            values["load_from"] = os.path.abspath(source.checkpoint)
        imports = base.get("custom_imports", {}).get("imports", [])
        imports = [imports] if isinstance(imports, str) else imports
        values["custom_imports"] = {"imports": sorted({*imports, "mmagic_tome"})}
        of = {key: getattr(request, key) for key in ("steps", "guidance", "size")}
        values |= {f"infer_cfg.{key}": value for key, value in of.items() if value is not None}
        config.merge_from_dict({**(cfg_options or {}), **values})
        text = f"_base_ = {os.path.relpath(base.filename, folder)!r}\n{config.pretty_text}"
    else:
        name, lines = source.class_name, ["import mmagic_tome", "import diffusers", ""]
        lines += [f"pipeline = diffusers.{name}.from_pretrained({source.path!r})"]
        for key, options in values.items():
            lines += [f"mmagic_tome.apply_{key.removesuffix('_cfg')}(pipeline, {options!r})"]
        text = "\n".join([*lines, ""])
    path = folder / f"{source.name}_tuned.py"
    write_text(path, text)
    return path
