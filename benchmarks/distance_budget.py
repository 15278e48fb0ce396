#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Does the distance of merged tokens say how many may merge? Against constant ratios.

Merging knows its distances before it merges. Here they choose the ratio of every target and step:
as many tokens merge as keep the summed distance (1 - cosine, per token, or weighed by the tokens'
energy) below a bound, for the image of a batch that has least. Beside it constant ratios, all
around self-attention with proportional attention. The demo model draws captions; per method the
mean ratio, the relative error of the final latents and the PSNR. Writes
``data/distance_budget.json``::

    python benchmarks/distance_budget.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from demo import psnr, relative_error
from frontier import Bench, Case, captions
from torch import Tensor
from tqdm import tqdm

from mmagic_tome import apply_tome
from mmagic_tome.lab.report import save_record
from mmagic_tome.merging import Plan, nearest_destination, plan_of_edges, strongest
from mmagic_tome.methods import Method, PlanRequest, register_method

DATA = Path(__file__).parent / "data/distance_budget.json"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BOUNDS = (0.001, 0.003, 0.01, 0.03)


@register_method("distance_budget")
class DistanceBudget(Method):
    """ToMe's edges, the closest first, as long as their summed distance stays below a bound.

    Args:
        bound: of the sum, relative to the number of tokens.
        energy: weigh distances by the squared norm of the source, relative to all tokens'.
    """

    ratios: ClassVar[list[float]] = []  # of every plan, for the caller to read

    def __init__(self, bound: float = 0.01, energy: bool = False) -> None:
        self.bound, self.energy = bound, energy

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan | None:
        destinations, sources = request.layout()
        best, nearest = nearest_destination(metric, destinations, sources, exact=True)
        count = metric.shape[1]
        weight = torch.full_like(best, 1 / count)
        if self.energy:
            squares = metric.square().sum(dim=-1)
            weight = squares[:, sources] / squares.sum(dim=1, keepdim=True)
        loss = ((1 - best).clamp(min=0) * weight).gather(1, best.argsort(dim=1, descending=True))
        found = min(r, int((loss.cumsum(dim=1) <= self.bound).sum(dim=1).min()))
        self.ratios.append(found / count)
        if not found:
            return None
        return plan_of_edges(destinations, sources, nearest, strongest(best, found), found)


def methods() -> dict[str, dict[str, Any]]:
    """Name -> options of merging."""
    made = {f"constant {ratio:g}": dict(ratio=ratio) for ratio in RATIOS}
    for energy in (False, True):
        for bound in BOUNDS:
            method = dict(type="distance_budget", bound=bound, energy=energy)
            name = f"distance{' and energy' if energy else ''} {bound:g}"
            made[name] = dict(ratio=0.75, method=method)
    return made


def main() -> None:
    """Measure, write the file, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=128, help="pixels; default: 128")
    parser.add_argument("--images", type=int, default=4, help="default: 4")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 7.5])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for guidance in args.guidance:
        bench = Bench(Case("unet", args.size, "DDIM", guidance, 20))
        found: dict[str, list[tuple[float, float, float]]] = {}
        for number, (caption, _) in enumerate(tqdm(captions("choose", args.images))):
            baseline = bench.draw(caption, number)
            image = bench.decode(baseline)
            for name, options in methods().items():
                DistanceBudget.ratios.clear()
                with apply_tome(bench.pipeline, targets="attn", prop_attn=True, **options):
                    latents = bench.draw(caption, number)
                ratio = mean(DistanceBudget.ratios or [options["ratio"]])
                measured = relative_error(latents, baseline), psnr(bench.decode(latents), image)
                found.setdefault(name, []).append((ratio, *measured))
        for name, values in found.items():
            ratio, error, fidelity = map(list, zip(*values))
            row = dict(guidance=guidance, method=name, ratio=ratio, error=error, psnr=fidelity)
            rows.append(row)
            print(f"{guidance:g} {name:28s}", *(f"{mean(one):.4g}" for one in (ratio, error)))
        settings = dict(model="demo model", size=f"{args.size}x{args.size}", dtype="float32")
        save_record(DATA, dict(settings, batch_size=1, images=args.images, steps=20), rows)


if __name__ == "__main__":
    main()
