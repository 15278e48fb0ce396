# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Time and memory of a network's forward or steps, methods side by side.

The same as ``python -m mmagic_tome benchmark``.
"""

from _start import start

if __name__ == "__main__":
    start("benchmark")
