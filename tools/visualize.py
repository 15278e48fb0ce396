# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merge maps, error maps and the cost of each layer, for the model of a MMagic config.

    python tools/visualize.py configs/demo/sd-emoji_tome-5e-1.py --prompt 'red apple' --out maps

The same as ``python -m mmagic_tome visualize``; see ``mmagic_tome/visualization/`` and
``docs/visualization.md``.
"""

import sys

from _start import start

if __name__ == "__main__":
    sys.exit(start("visualize"))
