# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's tools/train.py with this package's patches; see mmagic_tome/mmagic/entry.py.

    python tools/train.py configs/dreambooth/dreambooth-lora_tome-5e-1.py --work-dir lora

The same as ``python -m mmagic_tome train``.
"""

from _start import start

if __name__ == "__main__":
    start("train")
