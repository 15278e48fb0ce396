#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching with a tolerance beside that of other authors, DeepCache and fewer steps.

The demo model draws held-out captions, one image at a time in float32, by several schedulers,
guidance scales and numbers of steps. Per method and image: operations of the network relative to
the baseline (the time of a run would be noisy, so they stand in for it), the relative error of the
final latents, the PSNR to the baseline, and the PSNR to a converged solution, DPM-Solver++ with 200
steps. Goes on where it was interrupted. Writes ``data/step_caching_peers.json``::

    python benchmarks/step_caching_peers.py
    python benchmarks/step_caching_peers.py --table    # prints what the file has
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from demo import (
    SCHEDULERS,
    decode,
    demo_pipeline,
    draw,
    operations,
    psnr,
    relative_error,
    set_scheduler,
    shares,
)
from frontier import captions
from peers import adaptive_diffusion, easycache, fbcache, sada, spectrum, taylorseer, zeus
from tolerance import CHOSEN
from torch import Tensor
from tqdm import tqdm

from mmagic_tome import apply_cache
from mmagic_tome.lab.methods import Method
from mmagic_tome.lab.report import save_record

DATA = Path(__file__).parent / "data/step_caching_peers.json"
SIZE = 128
TOLERANCES = (0.005, 0.01, 0.02, 0.05, 0.1)
SHARES = (0.8, 0.65, 0.5, 0.4, 0.3)  # of the steps
BETTER = ("DPM-Solver++ 2M", "UniPC")  # samplers that users take to need fewer steps
CONVERGED = ("DPM-Solver++ 2M", 200)

#: Each paper's own setting and stronger or weaker ones.
PEERS = (
    *(zeus.method(interval) for interval in (2, 3, 4)),
    *(zeus.method(interval, spaced=True) for interval in (2, 3)),
    spectrum.method("Spectrum paper", **spectrum.PAPER),
    spectrum.method("Spectrum paper, growth 0.25", **{**spectrum.PAPER, "growth": 0.25}),
    spectrum.method("Spectrum paper, growth 0", **{**spectrum.PAPER, "growth": 0}),
    spectrum.method("Spectrum users", **spectrum.USERS),
    *(easycache.method(threshold) for threshold in (0.05, 0.1, 0.2)),
    *(easycache.ucache(threshold) for threshold in (0.5, 1.0)),
    *(fbcache.method(threshold) for threshold in (0.1, 0.15, 0.2)),
    *(adaptive_diffusion.method(threshold) for threshold in (0.01, 0.05, 0.2)),
    sada.method(4),
    *(sada.method(most, late=None) for most in (1, 4)),
    *(taylorseer.method(1, interval) for interval in (2, 3, 4)),
    *(taylorseer.method(2, interval) for interval in (2, 3)),
)
DEEPCACHE = (2, 3, 5)


class Bench:
    """The pipeline, and what is measured once.

    Args:
        prompts: one image each; its number is the seed.
        cache: folder of the runs that several cells share.
    """

    def __init__(self, prompts: Sequence[str], cache: Path) -> None:
        self.pipeline, self.prompts, self.cache = demo_pipeline(), prompts, cache
        self.left = shares(self.pipeline) | self._parts()

    def _parts(self) -> dict[str, float]:
        """Shares of a call that are left where methods skip less than the whole network."""
        counts, two_steps = operations(self.pipeline), operations(self.pipeline, 2)

        def share(*modules: str) -> float:
            return sum(counts.get(one, 0) for one in modules) / counts[""]

        head = share("conv_out")
        block = [f"down_blocks.0.{part}.0" for part in ("resnets", "attentions")]
        with Method("DeepCache", deepcache=2).on(self.pipeline):  # it skips the second
            left = 2 * operations(self.pipeline, 2)[""] / two_steps[""] - 1
        first = head + share("conv_in", "time_embedding", *block)
        return {"head": head, "first block": first, "DeepCache": left}

    def solution(self, scheduler: str, steps: int, guidance: float, number: int) -> Tensor:
        """The final latents of the unchanged model, from the cache if they are there. Leaves the
        pipeline with another scheduler."""
        file = self.cache / f"{scheduler}_{steps}_{guidance:g}_{number}.pt"
        if file.exists():
            return torch.load(file)
        set_scheduler(self.pipeline, scheduler)
        latents = draw(self.pipeline, self.prompts[number], number, SIZE, steps, guidance)
        self.cache.mkdir(parents=True, exist_ok=True)
        torch.save(latents.clone(), file)
        return latents

    def results(
        self, scheduler: str, guidance: float, steps: int, number: int
    ) -> Iterator[tuple[str, str, float, Tensor]]:
        """Kind and name of each method, its share of the baseline's operations, its latents."""
        solution, left = self.solution, self.left
        yield "baseline", "baseline", 1.0, solution(scheduler, steps, guidance, number)
        for share in SHARES:
            fewer = round(share * steps)
            latents = solution(scheduler, fewer, guidance, number)
            yield "fewer steps", f"{fewer} steps", fewer / steps, latents
            for other in BETTER:
                if other != scheduler:
                    latents = solution(other, fewer, guidance, number)
                    yield "other sampler", f"{other}, {fewer} steps", fewer / steps, latents
        set_scheduler(self.pipeline, scheduler)
        arguments = self.pipeline, self.prompts[number], number, SIZE, steps, guidance
        for tolerance in TOLERANCES:
            with apply_cache(self.pipeline, tolerance=tolerance) as handle:
                latents = draw(*arguments)
                done = sum(left[step] for step in handle.steps) / steps
            yield "ours", f"tolerance {tolerance:g}", done, latents
        for interval in DEEPCACHE:
            method = Method(f"DeepCache {interval}", deepcache=interval)
            with method.on(self.pipeline):
                latents = draw(*arguments)
            computed = math.ceil(steps / interval)
            done = (computed + (steps - computed) * left["DeepCache"]) / steps
            yield "DeepCache", method.name, done, latents
        for method in PEERS:
            with method.function(self.pipeline) as skipping:
                latents = draw(*arguments)
            done = sum(left[step] for step in skipping.steps) / steps
            yield "peer", method.name, done, latents

    @torch.no_grad()
    def cell(self, scheduler: str, guidance: float, steps: int) -> list[dict[str, Any]]:
        """The rows of one scheduler, guidance scale and number of steps."""
        rows: dict[str, dict[str, Any]] = {}
        for number in range(len(self.prompts)):
            converged = decode(self.pipeline, self.solution(*CONVERGED, guidance, number))
            baseline = image = None
            for kind, name, done, latents in self.results(scheduler, guidance, steps, number):
                decoded = decode(self.pipeline, latents)
                if baseline is None:
                    baseline, image = latents, decoded
                found = {
                    "error": relative_error(latents, baseline),
                    "psnr": psnr(decoded, image),
                    "converged": psnr(decoded, converged),
                }
                row = {"scheduler": scheduler, "guidance": guidance, "steps": steps}
                row |= {"kind": kind, "method": name, "operations": [], "images": []}
                row = rows.setdefault(name, row)
                row["operations"].append(round(done, 4))
                row["images"].append({key: float(f"{value:.4g}") for key, value in found.items()})
        return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the images of a cell, the most operations first."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    lines = []
    for cell, group in itertools.groupby(
        rows, key=lambda row: (row["scheduler"], row["guidance"], row["steps"])
    ):
        lines.append("{}, guidance {:g}, {} steps".format(*cell))
        lines.append(f"  {'':34s} operations   error  PSNR  PSNR to converged")
        for row in sorted(group, key=lambda row: -mean(row["operations"])):
            keys = ("error", "psnr", "converged")
            error, fidelity, converged = (mean([one[k] for one in row["images"]]) for k in keys)
            lines.append(
                f"  {row['method']:34s} {mean(row['operations']):10.3f} {error:7.4f} "
                f"{fidelity:5.1f} {converged:6.1f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure the cells that are not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=8, help="default: 8")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 7.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=CHOSEN)
    parser.add_argument("--data", type=Path, default=DATA, help="default: benchmarks/data/...")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    rows = json.loads(args.data.read_text())["rows"] if args.data.exists() else []
    if rows and len(rows[0]["operations"]) != args.images and not args.table:
        parser.error(f"{args.data} has {len(rows[0]['operations'])} images; write --images so")
    done = {(row["scheduler"], row["guidance"], row["steps"]) for row in rows}
    cells = itertools.product(args.schedulers, args.guidance, args.steps)
    cells = [] if args.table else [one for one in cells if one not in done]
    if cells:
        prompts = [text for text, _ in captions("held-out", args.images)]
        bench = Bench(prompts, Path(f"work_dirs/step_caching_peers/{args.images}_images"))
        settings = {"model": "demo model", "size": f"{SIZE}x{SIZE}", "images": args.images}
        settings.update(dtype="float32", captions="held out", left_if_skipped=bench.left)
        settings["converged"] = "{}, {} steps".format(*CONVERGED)
        for one in tqdm(cells, unit="cell"):
            rows += bench.cell(*one)
            save_record(args.data, settings, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
