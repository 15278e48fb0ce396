# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Generate images or clips of a MMagic config or a diffusers pipeline, with and without merging.

The same as ``python -m mmagic_tome infer``.
"""

from _start import start

if __name__ == "__main__":
    start("infer")
