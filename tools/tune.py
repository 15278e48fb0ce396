# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Find the options that reach a speed-up, or a PSNR, with the least error or time.

    python tools/tune.py configs/demo/sd-emoji.py --speedup 1.5

The same as ``python -m mmagic_tome tune``; see ``mmagic_tome/tuning/`` and ``docs/tuning.md``.
"""

import sys

from _start import start

if __name__ == "__main__":
    sys.exit(start("tune"))
