#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How well the next input of a denoising run follows from the run, and that of another image.

The residual of ``mmagic_tome.runs.Run.fit`` decides whether a call continues a run. For every
scheduler and guidance scale this denoises images with the demo model and fits

- ``own``: the inputs of a run's own next steps,
- ``other``: the inputs of other images at the same step,
- ``later``: the inputs of other images four steps later, as after a run that was stopped.

Writes ``data/run_continuity.json``; takes about six minutes on one core::

    python benchmarks/run_continuity.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from demo import SCHEDULERS, demo_pipeline, set_scheduler
from torch import Tensor
from tqdm import tqdm

from mmagic_tome.lab.report import save_record
from mmagic_tome.runs import Branch, Run

PROMPTS = ["red apple", "sailboat", "cat face", "green apple"]
STEPS, GUIDANCE = 20, (3.0, 7.5)
Calls = list[tuple[Tensor, Tensor]]


def trajectory(pipeline: Any, guidance: float, number: int) -> Calls:
    """(input, output) of every call of the network for one image."""
    calls: Calls = []

    def keep(module, args, kwargs, output):
        calls.append((args[0].clone(), output[0].clone()))

    hook = pipeline.unet.register_forward_hook(keep, with_kwargs=True)
    pipeline(
        PROMPTS[number],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(number),
        output_type="latent",
    )
    hook.remove()
    return calls


def residuals(images: list[Calls]) -> dict[str, list[float]]:
    """'own', 'other' and 'later' of all images and steps."""
    found: dict[str, list[float]] = {"own": [], "other": [], "later": []}
    for calls in images:
        run = Run(None)
        run.called, run.branches = [0], {0: Branch(None)}
        for step, (x, output) in enumerate(calls):
            if step:
                found["own"].append(run.fit([x]).residual)
                for other in (one for one in images if one is not calls):
                    found["other"].append(run.fit([other[step][0]]).residual)
                    if step + 4 < len(other):
                        found["later"].append(run.fit([other[step + 4][0]]).residual)
                run.previous, run.input = run.input, None
            run.remember([x], output)
    return found


def main() -> None:
    torch.set_num_threads(1)
    pipeline = demo_pipeline()
    rows = []
    for name in tqdm(SCHEDULERS, unit="scheduler"):
        set_scheduler(pipeline, name)
        for guidance in GUIDANCE:
            images = [trajectory(pipeline, guidance, number) for number in range(len(PROMPTS))]
            row = {"scheduler": name, "guidance": guidance, **residuals(images)}
            rows.append(row)
    settings = dict(model="demo model", size="128x128", images=len(PROMPTS), steps=STEPS)
    save_record(Path(__file__).parent / "data/run_continuity.json", settings, rows)


if __name__ == "__main__":
    main()
