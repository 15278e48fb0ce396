#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How well outputs of a network can be extrapolated from the steps before.

Keeps the outputs of the whole network and of its inner region in baseline runs of the demo model,
and compares each with the polynomial of order 0, 1 or 2 through those before it: the relative error
over all images. Writes ``data/smoothness.json``::

    python benchmarks/smoothness.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from demo import demo_pipeline
from torch import Tensor

from mmagic_tome.cache.extrapolate import extrapolate
from mmagic_tome.lab.report import save_record
from mmagic_tome.models import find_adapter

STEPS, GUIDANCE = 20, 3.0
PROMPTS = ["rocket", "panda", "red apple", "pizza", "guitar", "octopus", "crown", "robot"]
Outputs = list[tuple[float, Tensor]]


@torch.no_grad()
def record() -> dict[str, Outputs]:
    """Region -> (timestep, output) of every step."""
    pipeline = demo_pipeline()
    adapter, network = find_adapter(pipeline)
    seen: dict[str, Outputs] = {"network": [], "inner": []}
    now = [0.0]

    def start(module, args, kwargs):
        now[0] = float(adapter.timestep(args, kwargs))

    def keep(region):
        def hook(module, args, kwargs, output):
            y = output if isinstance(output, Tensor) else output[0]
            seen[region].append((now[0], y.clone()))

        return hook

    last = adapter.inner_modules(network, 1)[-1]
    network.register_forward_pre_hook(start, with_kwargs=True)
    network.register_forward_hook(keep("network"), with_kwargs=True)
    last.register_forward_hook(keep("inner"), with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    pipeline(
        PROMPTS, height=128, width=128, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=generators, output_type="latent",
    )  # fmt: skip
    return seen


def errors(outputs: Outputs, order: int) -> tuple[list[float], list[float]]:
    """Timesteps, and the relative error of the extrapolation at each."""
    times, found = [], []
    for step in range(order + 1, len(outputs)):
        time, y = outputs[step]
        before, values = zip(*outputs[step - 1 - order : step])
        times.append(time)
        found.append(float((extrapolate(before, values, time) - y).norm() / y.norm()))
    return times, found


if __name__ == "__main__":
    rows = []
    for region, outputs in record().items():
        for order in (0, 1, 2):
            times, found = errors(outputs, order)
            rows.append({"region": region, "order": order, "timesteps": times, "errors": found})
    settings = dict(model="demo model", size="128x128", images=len(PROMPTS), steps=STEPS)
    settings.update(scheduler="DDIMScheduler", guidance=GUIDANCE, dtype="float32")
    save_record(Path(__file__).parent / "data/smoothness.json", settings, rows)
