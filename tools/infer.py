# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Generate images with the model of a MMagic config, with token merging and step caching.

    python tools/infer.py configs/demo/sd-emoji_tome-balanced.py --prompt 'red apple' --compare

The same as ``python -m mmagic_tome infer``; see ``mmagic_tome/apis/cli.py``.
"""

import sys

from _start import start

if __name__ == "__main__":
    sys.exit(start("infer"))
