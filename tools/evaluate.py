# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Compare a model dense, with token merging and with fewer steps: metrics, cost, a report.

    python tools/evaluate.py configs/demo/sd-emoji.py --prompt-set demo --limit 50

The same as ``python -m mmagic_tome evaluate``; see ``mmagic_tome/evaluation/``. On several
devices: ``bash tools/dist_evaluate.sh CONFIG N``.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
if (CHECKOUT / "mmagic_tome").is_dir():
    # A checkout runs its own package, not another version that may be installed.
    sys.path.insert(0, str(CHECKOUT))


def main():
    """Run the command; return its exit code."""
    try:
        from mmagic_tome.evaluation import cli
    except KeyboardInterrupt:  # this import brings torch in, which takes seconds
        print("evaluate.py: interrupted", file=sys.stderr)
        return 130
    return cli.main(prog="evaluate.py")


if __name__ == "__main__":
    sys.exit(main())
