#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Predicted beside realised errors of runs with a tolerance, in many settings.

The demo model draws held-out captions, one image at a time: from text, from an image (strength
0.5), and inside a mask; with every scheduler, guidance scale and number of steps asked for, with
step caching and without. Nothing is timed, so other work may run beside it. Goes on where it was
interrupted. Writes ``data/calibration.json``::

    python benchmarks/calibration.py                                # from text, 128 px
    python benchmarks/calibration.py --size 256 --steps 20
    python benchmarks/calibration.py --task img2img inpaint --steps 20
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo import SCHEDULERS, demo_pipeline, relative_error, set_scheduler
from frontier import captions
from PIL import Image
from rows import known
from tolerance import CHOSEN as DETERMINISTIC
from torch import Tensor
from tqdm import tqdm

from mmagic_tome import apply_cache
from mmagic_tome.lab.report import save_record

DATA = Path(__file__).parent / "data/calibration.json"
CHOSEN = (*DETERMINISTIC, "PNDM", "Euler ancestral")
TASKS = ("text", "img2img", "inpaint")
STRENGTH = 0.5
KEYS = ("task", "size", "scheduler", "guidance", "steps")


def pipelines(base: Any) -> dict[str, Any]:
    """Task -> pipeline, all of the same modules."""
    import diffusers

    rest = {**base.components, "feature_extractor": None}
    made = {
        "text": base,
        "img2img": diffusers.StableDiffusionImg2ImgPipeline(**rest, requires_safety_checker=False),
        "inpaint": diffusers.StableDiffusionInpaintPipeline(**rest, requires_safety_checker=False),
    }
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def half_mask(size: int) -> Image.Image:
    """The right half is drawn anew."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 2, 0, size, size))
    return mask


@torch.no_grad()
def cell(
    made: dict[str, Any], one: dict[str, Any], prompts: Sequence[str], tolerance: float
) -> dict[str, Any]:
    """The row of one setting."""
    pipeline, size = made[one["task"]], one["size"]
    set_scheduler(pipeline, one["scheduler"])
    images = []
    for seed, prompt in enumerate(prompts):
        options = dict(num_inference_steps=one["steps"], guidance_scale=one["guidance"])
        if one["task"] == "text":
            options.update(height=size, width=size)
        else:
            # The picture of the caption before, drawn in the usual way.
            drawn = made["text"](
                prompts[seed - 1], height=size, width=size, num_inference_steps=20,
                guidance_scale=3.0, generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            options.update(image=drawn, strength=STRENGTH)
            if one["task"] == "inpaint":
                options.update(mask_image=half_mask(size), height=size, width=size)

        def draw(options: dict = options, seed: int = seed, prompt: str = prompt) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return pipeline(prompt, generator=generator, output_type="latent", **options).images

        baseline = draw()
        with apply_cache(pipeline, tolerance=tolerance) as cache:
            error = relative_error(draw(), baseline)
            predicted = max(cache.predicted_error or [0.0])
            computed = (cache.steps or ["computed"]).count("computed")
        images.append(
            {
                "error": float(f"{error:.4g}"),
                "predicted": float(f"{predicted:.4g}"),
                "computed": computed,
            }
        )
    return {**one, "tolerance": tolerance, "images": images}


def measure(wanted: Sequence[dict[str, Any]], prompts: Sequence[str], tolerance: float) -> None:
    """Measure the settings that are not in the file yet."""
    done = {tuple(row[key] for key in KEYS) for row in known(DATA)}
    made = pipelines(demo_pipeline())
    for setting in tqdm([s for s in wanted if tuple(s.values()) not in done], unit="cell"):
        row = cell(made, setting, prompts, tolerance)
        settings = {"model": "demo model", "batch_size": 1, "dtype": "float32"}
        save_record(DATA, {**settings, "captions": "held out"}, [*known(DATA), row])


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["text"])
    parser.add_argument("--size", type=int, nargs="+", default=[128], help="pixels")
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=CHOSEN)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 7.5, 12.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 20, 30, 50])
    parser.add_argument("--images", type=int, default=4, help="per setting; default: 4")
    parser.add_argument("--tolerance", type=float, default=0.02, help="default: 0.02")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    prompts = [text for text, _ in captions("held-out", args.images)]
    every = itertools.product(args.task, args.size, args.schedulers, args.guidance, args.steps)
    measure([dict(zip(KEYS, one)) for one in every], prompts, args.tolerance)


if __name__ == "__main__":
    main()
