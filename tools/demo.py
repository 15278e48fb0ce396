# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Serve a page that shows the baseline beside an accelerated run.

The same as ``python -m mmagic_tome demo``.
"""

from _start import start

if __name__ == "__main__":
    start("demo")
