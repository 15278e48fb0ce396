#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging where it pays: large pictures, whole runs, beside fewer steps.

The demo UNet at 256 pixels (4096 tokens at its finest level), or the demo transformer, with
self-attention or its keys and values merged at several ratios, with proportional attention and
without ("unweighed"), with plans reused, with and without step caching; ToDo; tomesd;
fewer steps.
How it is measured: ``frontier.py``. Choose settings on some captions, judge them on others. Writes
``data/merging_frontier.json``::

    python benchmarks/merging_frontier.py
    python benchmarks/merging_frontier.py --model transformer --schedulers flow
    python benchmarks/merging_frontier.py --captions judge --images 64 --only "ToMe 0.5|steps$"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import frontier
from frontier import Case

from mmagic_tome.lab.methods import Method, fewer_steps

DATA = Path(__file__).parent / "data/merging_frontier.json"
DEFAULT = Case("unet", 256, "DDIM", 3.0, 20)
RATIOS = (0.25, 0.5, 0.75)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the steps
TOLERANCES = (0.01, 0.02, 0.05)
#: What is changed of ToMe at each ratio.
VARIANTS = {
    "": dict(targets="attn"),
    "unweighed": dict(targets="attn", prop_attn=False),
    "keys and values": {},
    "keys and values, cells of 2x2": dict(targets="attn_kv", sx=2, sy=2),
    "keys and values, unweighed": dict(targets="attn_kv", prop_attn=False),
    "keys and values, plan of 2 steps": dict(plan_interval=2),
    "attn and cross-attention": dict(targets=("attn", "crossattn")),
    "blocks": dict(targets="block"),
    "plan of 2 steps": dict(targets="attn", plan_interval=2),
}


def entries() -> Iterator[dict[str, Any]]:
    """Those of this package."""
    for ratio in RATIOS:
        for label, changes in VARIANTS.items():
            name = ", ".join(filter(None, (f"ToMe {ratio:g}", label)))
            yield dict(name=name, tome_cfg=dict(ratio=ratio, **changes))
    for label, changes in (("", {}), (", unweighed", dict(prop_attn=False))):
        # Squares of 2x2 tokens become one, whatever the ratio is.
        yield dict(name=f"todo 0.75{label}", tome_cfg=dict(ratio=0.75, method="todo", **changes))
    yield dict(name="ToMe 0.9, keys and values", tome_cfg=dict(ratio=0.9))
    for tolerance in TOLERANCES:
        cache = dict(tolerance=tolerance)
        yield dict(name=f"tolerance {tolerance:g}", cache_cfg=cache)
        for label, more in (("", dict(targets="attn")), (", keys and values", {})):
            yield dict(
                name=f"tolerance {tolerance:g} and ToMe 0.5{label}",
                tome_cfg=dict(ratio=0.5, **more),
                cache_cfg=cache,
            )


def methods(case: Case) -> Sequence[Method]:
    """All of a case; a method of which nothing is known for this model is noted as such when it is
    tried."""
    made = [Method.from_dict(entry) for entry in entries()]
    if case.model == "unet":  # tomesd has nothing for transformers
        made += [Method(f"tomesd {ratio:g}", tomesd={"ratio": ratio}) for ratio in RATIOS]
    return [*made, *fewer_steps(SHARES, case.steps)]


if __name__ == "__main__":
    frontier.main(frontier.parser(__doc__.partition("\n")[0], DATA, DEFAULT).parse_args(), methods)
