#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs with a tolerance, beside fewer steps: time, predicted and realised errors.

The demo model draws held-out captions, one image at a time, by several schedulers and guidance
scales: the baseline, step caching at some tolerances, and the baseline with fewer steps, one after
the other for each image, in turns forwards and backwards. Goes on where it was interrupted. Writes
``data/tolerance.json``::

    python benchmarks/tolerance.py                     # 20 steps
    python benchmarks/tolerance.py --steps 50 --images 8
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo import SCHEDULERS, demo_pipeline, set_scheduler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mmagic_tome import apply_cache
from mmagic_tome.lab.prompts import read_prompts, spread
from mmagic_tome.lab.report import save_record
from mmagic_tome.models import find_adapter

DATA = Path(__file__).parent / "data/tolerance.json"
# Samplers that users run; the others of the table are variants.
CHOSEN = ("DDIM", "Euler", "DPM-Solver++ 2M", "UniPC")
SIZE = 128
TOLERANCES = (0.005, 0.01, 0.02, 0.05)
SHARES = (0.9, 0.8, 0.65, 0.5, 0.4)  # of the steps


def operations(pipeline: Any, steps: int = 1) -> dict[str, int]:
    """Path of a module of the network, '' for all of it -> its operations in so many steps."""
    name = type(find_adapter(pipeline)[1]).__name__
    with FlopCounterMode(display=False) as counter:
        pipeline("a", num_inference_steps=steps, output_type="latent", guidance_scale=3.0)
    counts = counter.get_flop_counts().items()
    return {path.removeprefix(name).lstrip("."): sum(one.values()) for path, one in counts}


def shares(pipeline: Any) -> dict[str, float]:
    """Region -> share of the operations of a call that are left if it is skipped."""
    adapter, network = find_adapter(pipeline)
    counts = operations(pipeline)
    names = {module: path for path, module in network.named_modules()}
    found = {"computed": 1.0, "network": 0.0}
    for region, depth in (("inner", 1), ("innermost", 2)):
        inside = [names[module] for module in adapter.inner_modules(network, depth)]
        found[region] = 1 - sum(counts.get(one, 0) for one in inside) / counts[""]
    return found


def run(pipeline: Any, prompt: str, seed: int, steps: int, guidance: float) -> Tensor:
    """The final latents."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        prompt, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=guidance,
        generator=generator, output_type="latent",
    ).images  # fmt: skip


def decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Pixels in 0 ... 1."""
    config = pipeline.vae.config
    latents = latents / config.scaling_factor + (config.get("shift_factor") or 0)
    image = pipeline.vae.decode(latents).sample
    return (image / 2 + 0.5).clamp(0, 1)


def psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of images in 0 ... 1; at most 120."""
    square = float((one - other).square().mean())
    return -10 * math.log10(max(square, 1e-12))


def relative_error(latents: Tensor, baseline: Tensor) -> float:
    """Of the final latents."""
    return float((latents - baseline).norm() / baseline.norm())


@torch.no_grad()
def cell(
    pipeline: Any, scheduler: str, guidance: float, steps: int, prompts: Sequence[str], left: dict
) -> list[dict[str, Any]]:
    """The rows of one scheduler, guidance scale and number of steps."""
    set_scheduler(pipeline, scheduler)
    rows: dict[str, dict[str, Any]] = {}
    methods = [*(f"tolerance {one:g}" for one in TOLERANCES)]
    methods += ["baseline", *(f"{round(share * steps)} steps" for share in SHARES)]
    run(pipeline, prompts[0], 0, steps, guidance)  # what the first run does besides
    for seed, prompt in enumerate(prompts):
        drawn: dict[str, tuple[Tensor, float, float, dict[str, float]]] = {}
        for method in methods[:: -1 if seed % 2 else 1]:
            kind, _, value = method.partition(" ")
            used, operations, more = steps, 1.0, {}
            with contextlib.ExitStack() as stack:
                if kind == "tolerance":
                    cache = stack.enter_context(apply_cache(pipeline, tolerance=float(value)))
                elif kind != "baseline":
                    used = int(kind)
                    operations = used / steps
                began = time.perf_counter()
                latents = run(pipeline, prompt, seed, used, guidance)
                seconds = time.perf_counter() - began
                if kind == "tolerance":
                    more["predicted"] = max(cache.predicted_error or [0.0])
                    operations = sum(left[step] for step in cache.steps) / steps
            drawn[method] = latents, operations, seconds, more
        baseline = drawn["baseline"][0]
        image = decode(pipeline, baseline)
        for method in methods:
            latents, operations, seconds, more = drawn[method]
            row = {"scheduler": scheduler, "guidance": guidance, "steps": steps, "method": method}
            row = rows.setdefault(method, {**row, "operations": [], "seconds": [], "images": []})
            row["operations"].append(round(operations, 4))
            row["seconds"].append(round(seconds, 4))
            if method != "baseline":
                found = {
                    "error": relative_error(latents, baseline),
                    "psnr": psnr(decode(pipeline, latents), image),
                    **more,
                }
                row["images"].append({key: float(f"{one:.4g}") for key, one in found.items()})
    return list(rows.values())


def known(data: Path = DATA) -> list[dict[str, Any]]:
    """The rows that are in a file; none if it is not there."""
    return json.loads(data.read_text())["rows"] if data.exists() else []


def main() -> None:
    """Measure the cells that are not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=16, help="default: 16")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 7.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=CHOSEN)
    args = parser.parse_args()
    torch.set_num_threads(1)
    every = [one.text for one in read_prompts("demo-held-out")]
    prompts = spread(every, args.images)
    pipeline = demo_pipeline()
    left = shares(pipeline)
    done = {(row["scheduler"], row["guidance"], row["steps"]) for row in known()}
    cells = list(itertools.product(args.schedulers, args.guidance, args.steps))
    for one in tqdm([one for one in cells if one not in done], unit="cell"):
        new = cell(pipeline, *one, prompts, left)
        rows = known() + new  # a second process may have written meanwhile
        settings = {"model": "demo model", "size": f"{SIZE}x{SIZE}", "batch_size": 1}
        settings.update(dtype="float32", captions="held out", left_if_skipped=left)
        save_record(DATA, settings, rows)


if __name__ == "__main__":
    main()
