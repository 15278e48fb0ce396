# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Not there any more: tools/evaluate.py compares settings.

The same as ``python -m mmagic_tome tune``.
"""

from _start import start

if __name__ == "__main__":
    start("tune")
