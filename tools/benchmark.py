# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Time and memory of one forward: dense, ours, tomesd, MMagic's own and the ideal, side by side.

    python tools/benchmark.py --quick
    python tools/benchmark.py --help

See ``mmagic_tome/benchmark/`` and ``docs/benchmarking.md``.
"""

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
if (CHECKOUT / "mmagic_tome").is_dir():
    # A checkout runs its own package, not another version that may be installed.
    sys.path.insert(0, str(CHECKOUT))
# Torch's profiler, which measures memory on a CPU, is talkative without it; read at import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def main():
    """Run the command; return its exit code."""
    try:
        from mmagic_tome.benchmark import cli
    except KeyboardInterrupt:  # this import brings torch in, which takes seconds
        print("benchmark.py: interrupted", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
