#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs with a tolerance, beside fewer steps: time, predicted and realised errors.

The demo model draws held-out captions by several schedulers and guidance scales: step caching at
some tolerances, and the baseline with fewer steps. How it is measured: ``frontier.py``. Writes
``data/tolerance.json``::

    python benchmarks/tolerance.py                     # 20 steps
    python benchmarks/tolerance.py --steps 50 --images 16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import frontier
from frontier import Case

from mmagic_tome.lab.methods import Method, fewer_steps

DATA = Path(__file__).parent / "data/tolerance.json"
DEFAULT = Case("unet", 128, "DDIM", 3.0, 20)
# Samplers that users run; the others of ``demo.SCHEDULERS`` are variants.
CHOSEN = ("DDIM", "Euler", "DPM-Solver++ 2M", "UniPC")
TOLERANCES = (0.005, 0.01, 0.02, 0.05)
SHARES = (0.9, 0.8, 0.65, 0.5, 0.4)  # of the steps


def methods(case: Case) -> Sequence[Method]:
    """All of a case."""
    entries = (dict(name=f"tolerance {one:g}", cache_cfg=dict(tolerance=one)) for one in TOLERANCES)
    return [*map(Method.from_dict, entries), *fewer_steps(SHARES, case.steps)]


if __name__ == "__main__":
    parser = frontier.parser(__doc__.partition("\n")[0], DATA, DEFAULT)
    parser.set_defaults(schedulers=CHOSEN, captions="held-out", images=64)
    frontier.main(parser.parse_args(), methods)
