#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching and token merging of a trained diffusion transformer, beside what others offer.

The demo transformer draws captions by its own scheduler (flow matching, Euler), with guidance and
without: step caching with a tolerance and at fixed steps, of the network and of its inner region;
what diffusers and cache-dit have; token merging; fewer steps. How it is measured:
``frontier.py``. Writes ``data/diffusion_transformer.json``::

    python benchmarks/diffusion_transformer.py                     # 20, 28 and 50 steps
    python benchmarks/diffusion_transformer.py --captions judge --images 64 --memory
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import frontier
from frontier import Bench, Case
from peers import of_packages

from mmagic_tome.lab.methods import Method, fewer_steps

DATA = Path(__file__).parent / "data/diffusion_transformer.json"
DEFAULT = Case("transformer", 256, "flow", 3.0, 20)
TOLERANCES = (0.005, 0.01, 0.02, 0.05, 0.1)
SHARES = (0.85, 0.75, 0.65, 0.5, 0.4, 0.3)  # of the steps
FIXED = {
    "network, every 2nd": dict(region="network", interval=2),
    "network, every 3rd": dict(region="network", interval=3),
    "inner, every 2nd": dict(region="inner", interval=2),
    "inner, every 3rd": dict(region="inner", interval=3),
}
RATIOS = (0.25, 0.5)


@functools.cache
def _mag_ratios(case: Case) -> tuple[float, ...]:
    """MagCache's calibration on a caption for choosing that no image is drawn of."""
    bench = Bench(case)
    caption = frontier.captions("choose", 100)[-1][0]
    return tuple(
        of_packages.mag_ratios(bench.pipeline, lambda: bench.draw(caption, 999), case.steps)
    )


def methods(case: Case) -> Sequence[Method]:
    """All of a case."""
    entries = [
        *(dict(name=f"tolerance {one:g}", cache_cfg=dict(tolerance=one)) for one in TOLERANCES),
        *(dict(name=name, cache_cfg=options) for name, options in FIXED.items()),
        *(
            dict(name=f"ToMe {ratio:g}{name}", tome_cfg=dict(ratio=ratio, **options))
            for ratio in RATIOS
            for name, options in (
                ("", {}),
                (", unweighed", dict(prop_attn=False)),
                (", blocks", dict(targets="block")),
            )
        ),
        dict(
            name="tolerance 0.02 and ToMe 0.25",
            cache_cfg=dict(tolerance=0.02),
            tome_cfg=dict(ratio=0.25),
        ),
    ]
    ratios = _mag_ratios(case)
    others = [
        *(of_packages.first_block_cache(one) for one in (0.03, 0.05, 0.1, 0.15)),
        *(of_packages.taylorseer(interval) for interval in (2, 3, 5)),
        of_packages.taylorseer(3, order=2),
        of_packages.taylorseer(3, lite=True),
        *(of_packages.mag_cache(one, ratios) for one in (0.02, 0.06, 0.12)),
        *(of_packages.pyramid_attention_broadcast(interval) for interval in (2, 3)),
        of_packages.faster_cache(case.guidance > 1),
        *(of_packages.sea_cache(one) for one in (0.1, 0.25)),
        of_packages.cache_dit(),
        *(
            of_packages.cache_dit(
                f"threshold {one:g}", Fn_compute_blocks=1, residual_diff_threshold=one
            )
            for one in (0.08, 0.16)
        ),
        of_packages.cache_dit(
            "threshold 0.08, TaylorSeer",
            taylorseer=True,
            Fn_compute_blocks=1,
            residual_diff_threshold=0.08,
        ),
    ]
    return [*map(Method.from_dict, entries), *others, *fewer_steps(SHARES, case.steps)]


if __name__ == "__main__":
    parser = frontier.parser(__doc__.partition("\n")[0], DATA, DEFAULT)
    parser.set_defaults(steps=[20, 28, 50], guidance=[1.0, 3.0, 7.5])
    frontier.main(parser.parse_args(), methods)
