#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CPU time that a run spends inside the hooks of merging, beside what merging saves.

An eta from whole runs has the noise of whole runs in it twice. On a CPU nothing goes on behind a
hook's back, so the seconds between its start and its end are what the machinery costs: matching,
merging, unmerging::

    python benchmarks/in_hooks.py --plan-interval 4 --ratio 0.5
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from mmagic_tome import apply_tome
from mmagic_tome.benchmark.denoisers import denoising_run
from mmagic_tome.benchmark.targets import build_shape
from mmagic_tome.meters import Clock
from mmagic_tome.patch import Hook
from mmagic_tome.tome import block, network, residual, target

_MODULES = (block, network, residual, target)


class Stopwatch:
    """CPU seconds inside hooks while it is entered, by their class; what one calls is its own."""

    def __init__(self) -> None:
        found = (kind for module in _MODULES for kind in vars(module).values())
        kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, Hook)}
        self._calls = {kind: vars(kind)["__call__"] for kind in kinds if "__call__" in vars(kind)}
        self._inside = False
        self.seconds: dict[str, float] = defaultdict(float)

    def __enter__(self) -> Stopwatch:
        for kind, call in self._calls.items():
            kind.__call__ = self._timed(call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for kind, call in self._calls.items():
            kind.__call__ = call

    def _timed(self, call: Callable) -> Callable:
        def timed(hook, *args, **kwargs):
            if self._inside:
                return call(hook, *args, **kwargs)
            self._inside = True
            start = time.process_time()
            try:
                return call(hook, *args, **kwargs)
            finally:
                self.seconds[type(hook).__name__] += time.process_time() - start
                self._inside = False

        return timed


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="sd15-level0", help="network (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument(
        "--plan-interval",
        type=int,
        default=4,
        help="also the steps of a run (default: %(default)s)",
    )
    parser.add_argument("--runs", type=int, default=2, help="of each (default: %(default)s)")
    args = parser.parse_args(argv)
    built = build_shape(args.shape, "cpu", torch.float32)
    run = denoising_run(built.call((args.size, args.size), args.batch), args.plan_interval)
    model, clock = built.network, Clock("cpu", "cpu")
    options = {"ratio": args.ratio, "plan_interval": args.plan_interval}
    for number in range(args.runs):
        dense, _ = clock(lambda: run(model))
        with apply_tome(model, options), Stopwatch() as watch:
            merged, _ = clock(lambda: run(model))
        inside = sum(watch.seconds.values())
        saved = dense - merged
        print(
            f"run {number + 1}: dense {dense:.2f} s, merged {merged:.2f} s, {dense / merged:.2f}x, "
            f"in hooks {inside:.3f} s, {inside / (saved + inside):.1%} of what merging saves "
            "without them",
            flush=True,
        )
        for kind, seconds in sorted(watch.seconds.items(), key=lambda pair: -pair[1]):
            print(f"    {kind}: {1000 * seconds:.1f} ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
