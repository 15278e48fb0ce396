# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Find the tolerance of step caching for a speed-up or a PSNR, and write a config.

The same as ``python -m mmagic_tome tune``.
"""

from _start import start

if __name__ == "__main__":
    start("tune")
