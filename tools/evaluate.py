# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Compare a model dense, with merging, step caching and fewer steps: metrics, cost, a report.

    python tools/evaluate.py configs/demo/sd-emoji.py --prompt-set demo --limit 50

The same as ``python -m mmagic_tome evaluate``; see ``mmagic_tome/evaluation/``. On several
devices: ``bash tools/dist_evaluate.sh CONFIG N``.
"""

import sys

from _start import start

if __name__ == "__main__":
    sys.exit(start("evaluate"))
