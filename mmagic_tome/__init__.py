# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Faster diffusion models by merging redundant tokens, without training."""

from .config import ToMeConfig
from .engine import ToMeHandle, apply_tome, get_handle, remove_tome
from .errors import ToMeError
from .version import __version__

__all__ = [
    "ToMeConfig",
    "ToMeError",
    "ToMeHandle",
    "__version__",
    "apply_tome",
    "get_handle",
    "remove_tome",
]
