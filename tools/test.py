# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's tools/test.py with this package's patches; see mmagic_tome/mmagic/entry.py.

    python tools/test.py configs/demo/sd-emoji_eval.py [CHECKPOINT] --out metrics.json

The same as ``python -m mmagic_tome test``.
"""

from _start import start

if __name__ == "__main__":
    start("test")
