# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the ``infer`` command does after its own cheap checks in ``cli.py``.

The request is checked against the config, the model is built and run (dense
and merged in turn with ``--compare``), images and ``result.json`` are written.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import ToMeError, apply_cache, apply_tome
from ..cache import to_plain
from ..schedulers import scheduler_name
from ..settings import Handles
from ..version import __version__
from .command_line import check_default
from .model_config import (
    build_model,
    check_config,
    check_device,
    inner_model,
    load_config,
    setting_config,
)
from .pictures import ResultFolder, compare_sheet, file_stem, picture_difference
from .text2image import Generator, Request

ROWS_OF_SHEET = 16
WARM_UP_STEPS = 2
# A machine of one's own repeats a run within a few per cent, laptops within twenty.
STEADY = 1.25


@dataclass
class Pass:
    """Images and clocks of one mode (dense or merged) over all rounds."""

    images: dict = field(default_factory=dict)  # number of the image: PIL image of round 1
    clocks: list = field(default_factory=list)  # (numbers of the batch, Clock), in time order
    identical: bool = True  # whether later rounds gave the same images, bit for bit

    def add(self, numbers, images, clock):
        self.clocks.append((tuple(numbers), clock))
        for number, image in zip(numbers, images):
            first = self.images.setdefault(number, image)
            if first is not image:
                self.identical &= np.array_equal(np.asarray(first), np.asarray(image))

    def per_image(self, part="total"):
        """Return seconds per image of each run of the model."""
        return [getattr(clock, part) / len(numbers) for numbers, clock in self.clocks]


def spread(values):
    """Return median, minimum, maximum and count of some figures, as a dict."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": len(values),
    }


def spread_text(values, unit="s"):
    """Return figures as text: ``'3.21 s'``, with their range if there are several."""
    text = f"{statistics.median(values):.2f}{unit and ' ' + unit}"
    if len(values) > 1:
        text += f" ({min(values):.2f} to {max(values):.2f})"
    return text


class PairedRun:
    """Runs a request in one or two modes, in rounds, and writes what comes out.

    Args:
        generator: The :class:`Generator`.
        handles: The :class:`Handles` of what is applied to its model.
        compare: Whether to run the dense mode too.
        rounds: How often to run everything.
        folder: The ``ResultFolder`` to write to.
        text: Metadata common to all images, a dict of strings.
    """

    def __init__(self, generator, handles, compare, rounds, folder, text):
        self.generator, self.handles = generator, handles
        self.rounds, self.folder, self.text = rounds, folder, text
        self.passes = {mode: Pass() for mode in (("dense", "merged") if compare else ("merged",))}
        self.files = {}
        self.stats, self.summaries = {}, []

    def mode(self, mode):
        """Return a context in which the model is dense or merged."""
        return self.handles.disabled() if mode == "dense" else nullcontext()

    def run(self):
        """Run everything; images are written at the end of their batch."""
        request = self.generator.request
        batches = request.batches()
        warm_up = min(WARM_UP_STEPS, request.steps) if len(self.passes) > 1 else 0
        runs = self.rounds * len(batches) * len(self.passes)
        total = runs * request.steps + warm_up * len(self.passes)
        slow = None if sys.stderr.isatty() else 10.0
        bars = {"dynamic_ncols": True, "mininterval": slow or 0.1, "leave": False}
        images = self.rounds * len(request.prompts)
        with (
            tqdm(total=images, desc="images", unit="image", **bars) as outer,
            tqdm(total=total, desc="steps", unit="step", position=1, **bars) as inner,
        ):
            if warm_up:
                inner.set_description("warm-up")
                for mode in self.passes:
                    with self.mode(mode):
                        self.generator.run(batches[0], warm_up, on_step=inner.update)
            for turn in range(self.rounds):
                for index, numbers in enumerate(batches):
                    # Both orders take turns, so that drift favours neither.
                    modes = list(self.passes)[:: -1 if (turn + index) % 2 else 1]
                    for mode in modes:
                        inner.set_description(mode if len(self.passes) > 1 else "steps")
                        self.run_mode(mode, numbers, inner.update)
                    if turn == 0:
                        self.save(numbers)
                    outer.update(len(numbers))

    def run_mode(self, mode, numbers, on_step):
        with self.mode(mode):
            self.handles.reset_stats()
            self.handles.reset_run()
            images, clock = self.generator.run(numbers, on_step=on_step)
        self.passes[mode].add(numbers, images, clock)
        if mode == "merged":
            self.stats = {handle.technique: handle.stats() for handle in self.handles}
            self.summaries = [handle.summary() for handle in self.handles]

    def save(self, numbers):
        """Write the images of a batch, each with what it takes to make it again."""
        request = self.generator.request
        for number in numbers:
            stem = file_stem(number, request.prompts[number])
            names = {}
            for mode, result in self.passes.items():
                names[mode] = f"{stem}_dense.png" if mode == "dense" else f"{stem}.png"
                applied = Handles() if mode == "dense" else self.handles
                text = {
                    "prompt": request.prompts[number],
                    "seed": str(request.seed_of(number)),
                    "token_merging": applied.tome.description if applied.tome else "none",
                    "step_caching": applied.cache.description if applied.cache else "none",
                    **self.text,
                }
                self.folder.save_png(names[mode], result.images[number], text)
            self.files[number] = names


# --- results -----------------------------------------------------------------


def versions():
    """Return versions of the libraries that decide what an image looks like."""
    found = {"mmagic_tome": __version__, "python": platform.python_version()}
    for name in ("torch", "mmagic", "mmengine", "mmcv", "diffusers", "transformers", "numpy"):
        for distribution in (name, f"{name}-lite"):
            try:
                found[distribution] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def _processor():
    """Return the name of the processor; of its architecture where the system tells no more."""
    with suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def environment(device):
    """Return what the times depend on, as a dict."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_1min": load,
        "gpu": gpu,
    }


def timing_report(paired):
    """Return the ``timing`` part of result.json."""
    report = {
        "what": "seconds per image of whole model.infer calls: text encoder, all steps, VAE; "
        "'unet' is the share of the UNet's forwards in them",
        "rounds": paired.rounds,
        "warm_up": (
            f"one run of {WARM_UP_STEPS} steps per mode" if len(paired.passes) > 1 else "none"
        ),
    }
    for mode, result in paired.passes.items():
        report[mode] = {
            "seconds_per_image": spread(result.per_image()),
            "unet_seconds_per_image": spread(result.per_image("unet")),
            "repeats_identical": result.identical if paired.rounds > 1 else None,
            "runs": [
                {
                    "images": list(numbers),
                    **{k: v for k, v in asdict(clock).items() if v is not None},
                }
                for numbers, clock in result.clocks
            ],
        }
    if len(paired.passes) > 1:
        report["speedup"] = spread(speedups(paired))
        report["unet_speedup"] = spread(speedups(paired, "unet"))
    return report


def speedups(paired, part="total"):
    """Return dense time / merged time of each pair of runs, in time order."""
    pairs = zip(paired.passes["dense"].per_image(part), paired.passes["merged"].per_image(part))
    return [dense / merged for dense, merged in pairs]


def image_reports(paired):
    """Return the ``images`` part of result.json."""
    request = paired.generator.request
    reports = []
    for number, names in sorted(paired.files.items()):
        report = {
            "prompt": request.prompts[number],
            "seed": request.seed_of(number),
            "file": names["merged"],
        }
        if "dense" in names:
            images = [paired.passes[mode].images[number] for mode in ("dense", "merged")]
            report["dense_file"] = names["dense"]
            report.update(picture_difference(*images))
        reports.append(report)
    return reports


def write_sheet(paired, reports, title):
    """Write ``compare.png``; return its name."""
    dense, merged = paired.passes["dense"], paired.passes["merged"]
    speedup = statistics.median(speedups(paired))
    heads = [
        ("baseline", spread_text(dense.per_image())),
        (
            f"{what_was_done(paired.handles)}: {speedup:.2f}x as fast",
            spread_text(merged.per_image()),
        ),
    ]
    rows = [
        (
            f"{report['prompt']}  (seed {report['seed']}, PSNR {psnr_text(report['psnr_db'])})",
            dense.images[number],
            merged.images[number],
        )
        for number, report in list(enumerate(reports))[:ROWS_OF_SHEET]
    ]
    if len(reports) > len(rows):
        title += f"; the first {len(rows)} of {len(reports)} prompts"
    paired.folder.save_png("compare.png", compare_sheet(title, heads, rows), paired.text)
    return "compare.png"


def what_was_done(handles):
    """Return 'merged', 'cached' or both, as labels of images and times."""
    done = [("merged", handles.tome), ("cached", handles.cache)]
    return " and ".join(word for word, handle in done if handle is not None) or "baseline"


def psnr_text(value):
    """Return a PSNR in dB as text; None means that the pictures are the same."""
    return "identical" if value is None else f"{value:.1f} dB"


def command(args, argv):
    """Do what the ``infer`` command was asked to; see ``cli.py`` for ``args``.

    Raises:
        ToMeError: For input that cannot work, before a model is loaded where
            the config tells.
        KeyboardInterrupt: Its message says what is there already.
    """
    device = check_device(args.device)
    config = load_config(args.config_path, args.cfg_options)
    request = make_request(args, config)
    named = {"cache": args.cache, "ratio": args.ratio}
    options = {key: value for key, value in named.items() if value is not None}
    check_config(config, request, options, args.compare)

    if request.negative_prompt and request.guidance <= 1:
        print("note: the negative prompt has no effect at a guidance of 1 or less")

    quiet_libraries()
    print(f"building {inner_model(config).type} of {args.config} on {device}")
    model = build_model(config, device, args.dtype)
    generator = Generator(model, request)
    handles = apply_setting(model, setting_config(config), options)

    rounds = args.repeats or (math.ceil(3 / len(request.batches())) if args.compare else 1)
    height, width = generator.size
    dtype = str(next(model.unet.parameters()).dtype).replace("torch.", "")
    settings = {
        "config": args.config,
        "negative_prompt": request.negative_prompt or "",
        "steps": request.steps,
        "guidance": request.guidance,
        "size": f"{height}x{width}",
        "scheduler": scheduler_name(model.test_scheduler),
        "dtype": dtype,
        "device": str(device),
    }
    text = {key: str(value) for key, value in settings.items()}
    applied = {}
    if handles.tome is not None:
        applied["tome_cfg"] = handles.tome.config.to_record()
    if handles.cache is not None:
        applied["cache_cfg"] = to_plain(handles.cache.config)
    text.update({key: json.dumps(value) for key, value in applied.items()})
    text["software"] = "mmagic_tome " + __version__
    text["versions"] = json.dumps(versions())
    folder = ResultFolder(args.folder, overwrite=args.overwrite)
    paired = PairedRun(generator, handles, args.compare, rounds, folder, text)
    try:
        paired.run()
    except KeyboardInterrupt:
        done = f"; {len(paired.files)} of {len(request.prompts)} prompts are complete"
        raise KeyboardInterrupt(f"{done} in {folder.path}" if paired.files else "") from None

    reports = image_reports(paired)
    sheet = None
    if args.compare:
        title = (
            f"{Path(args.config).stem}: {request.steps} steps, {height}x{width}, "
            f"{device} {dtype}, times per image"
        )
        sheet = write_sheet(paired, reports, title)
    result = {
        "command": ["infer", *argv],
        "settings": {**settings, "seed": request.seed, "batch_size": request.batch_size},
        "token_merging": None
        if handles.tome is None
        else {"config": applied["tome_cfg"], "targets": paired.stats[handles.tome.technique]},
        "step_caching": None
        if handles.cache is None
        else {"config": applied["cache_cfg"], "regions": paired.stats[handles.cache.technique]},
        "timing": timing_report(paired),
        "images": reports,
        "compare": sheet,
        "environment": environment(device),
    }
    folder.save_json("result.json", result)
    print_report(paired, reports, sheet)


def apply_setting(model, setting, options):
    """Apply what is not applied yet to a model that was built from a config.

    Args:
        model: The model.
        setting: The :class:`Setting` of its config.
        options: Options of a setting that replace the config's, a dict.

    Returns:
        The :class:`Handles`.
    """
    wanted = setting.replace(**options)
    handles = Handles.of(model)
    tome, cache = handles.tome, handles.cache
    if wanted.tome is not None and (tome is None or wanted.tome != setting.tome):
        tome = apply_tome(model, wanted.tome)
    if wanted.cache is not None and (cache is None or wanted.cache != setting.cache):
        cache = apply_cache(model, wanted.cache)
    return Handles(tome, cache)


def quiet_libraries():
    """Keep the libraries' notes and bars of their own out of the command's output."""
    from diffusers.utils import logging as diffusers_logging
    from mmengine.logging import MMLogger
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    MMLogger.get_current_instance().setLevel("WARNING")


def make_request(args, config):
    """Return the :class:`Request`: the command's options, else the config's ``infer_cfg``."""
    given = config.get("infer_cfg")
    if not isinstance(given, (dict, type(None))):
        raise ToMeError(f"infer_cfg of the config: expected a dict, got {given!r}")
    given = dict(given or {})
    known = set(Request.__dataclass_fields__)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ToMeError(
            f"the config's infer_cfg has unknown keys {unknown}; it takes {sorted(known)}"
        )
    given = {key: check_default(key, value) for key, value in given.items() if value is not None}
    for key in known:
        value = getattr(args, key)
        if value is not None and value != []:
            given[key] = value
    if not given.get("prompts"):
        raise ToMeError("no prompts: pass --prompt TEXT ... or --prompt-file FILE")
    return Request(**given)


def print_report(paired, reports, sheet):
    """Print where the pictures are, what was merged, how long it took."""
    print(f"\nPictures ({len(reports)}) and result.json: {paired.folder.path}")
    for report in reports[:ROWS_OF_SHEET]:
        quality = f"  PSNR {psnr_text(report['psnr_db'])}" if "psnr_db" in report else ""
        print(f"  {report['file']}{quality}  {report['prompt']}")
    if len(reports) > ROWS_OF_SHEET:
        print(f"  ... and {len(reports) - ROWS_OF_SHEET} more")
    if sheet:
        print(f"Side by side: {paired.folder.path / sheet}")

    applied = bool(paired.summaries)
    for summary in paired.summaries:
        print(f"\nIn the last run, {summary}")
    if not applied:
        print(
            "\nNothing was merged or skipped: neither tome_cfg nor cache_cfg in the config, no "
            "--ratio and no --cache"
        )

    steps = paired.generator.request.steps
    print(f"\nTime per image, whole run with {steps} steps (in brackets the UNet alone):")
    labels = {"dense": "baseline", "merged": what_was_done(paired.handles)}
    width = max(map(len, labels.values()))
    for mode, result in paired.passes.items():
        whole, unet = spread_text(result.per_image()), spread_text(result.per_image("unet"))
        print(f"  {labels[mode]:{width}}  {whole}  [{unet}]")
    if len(paired.passes) > 1:
        both = paired.passes.values()
        whole = spread_text(speedups(paired), "")
        print(f"  speed-up {whole}x  [{spread_text(speedups(paired, 'unet'), '')}x]")
        runs = len(paired.passes["dense"].clocks)
        pairs = f"{runs} pair{'s' * (runs > 1)} of runs in alternating order, after a warm-up"
        print(f"  median (and range) of {pairs}")
        if any(max(times) > STEADY * min(times) for times in map(Pass.per_image, both)):
            print(
                "  These times are not steady: other programs were using this machine. "
                "Take the ratios with care, or run again with --repeats 5."
            )
    else:
        print("  one mode, no warm-up: --compare measures against the baseline")
