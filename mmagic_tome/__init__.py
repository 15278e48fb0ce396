# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Faster diffusion models by merging redundant tokens, without training."""

from .errors import ToMeError
from .version import __version__

__all__ = ["ToMeError", "__version__"]
