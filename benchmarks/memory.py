#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Peak of the tensors of a run, dense and merged, without any timing.

``tools/benchmark.py`` measures it too, after at least three rounds of everybody, which takes hours
where a forward takes minutes. The dense network runs once, since all its steps are alike; ours runs
two steps, so that plans kept for the next step count::

    python benchmarks/memory.py --size 2048 --tome 'plans={"plan_interval": 2}'
"""

from __future__ import annotations

import argparse
import json

import torch

from mmagic_tome.benchmark.targets import build_shape
from mmagic_tome.contenders import parse_named
from mmagic_tome.meters import peak_memory
from mmagic_tome.settings import Setting


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="sd15-level0", help="network (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--tome", action="append", default=[], metavar="NAME={...}")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    configs = dict(parse_named(text, taken=("dense",)) for text in args.tome)
    target = build_shape(args.shape, "cpu", torch.float32)
    call = target.call((args.size, args.size), args.batch)

    def two_steps() -> None:
        for time in (999, 499):
            call(target.network, time)

    dense, operator = peak_memory(lambda: call(target.network), "cpu")
    print(f"dense: {dense / 2**20:.3f} MiB in {operator}", flush=True)
    for name, config in configs.items():
        with Setting.coerce(config).apply(target.network):
            peak, operator = peak_memory(two_steps, "cpu")
        print(
            f"{name} {json.dumps(config)}: {peak / 2**20:.3f} MiB in {operator}, "
            f"{(peak - dense) / 2**20:+.3f} ({peak / dense - 1:+.2%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
