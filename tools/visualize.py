# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Draw which tokens are merged, and where images change.

The same as ``python -m mmagic_tome visualize``.
"""

from _start import start

if __name__ == "__main__":
    start("visualize")
