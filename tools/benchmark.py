# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Time and memory of one forward: dense, ours, tomesd, MMagic's own and the ideal, side by side.

    python tools/benchmark.py --quick
    python tools/benchmark.py --help

The same as ``python -m mmagic_tome benchmark``; see ``mmagic_tome/benchmark/`` and
``docs/benchmarking.md``.
"""

import os
import sys

from _start import start

# Torch's profiler, which measures memory on a CPU, is talkative without it; read at import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

if __name__ == "__main__":
    sys.exit(start("benchmark"))
