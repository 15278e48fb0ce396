# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Compare methods on many prompts: metrics, cost, a report.

The same as ``python -m mmagic_tome evaluate``.
"""

from _start import start

if __name__ == "__main__":
    start("evaluate")
