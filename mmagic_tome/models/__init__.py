# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Model adapters: where a network's blocks, token grids and targets are.

One class per model family. An adapter names modules; it changes no forward and does not depend on
how tokens are matched.
"""

from __future__ import annotations

from .base import Block, ModelAdapter, blocks_of
from .find import (
    ADAPTERS,
    Denoiser,
    find_adapter,
    find_controlnets,
    find_denoisers,
    register_adapter,
)

__all__ = [
    "ADAPTERS",
    "Block",
    "Denoiser",
    "ModelAdapter",
    "blocks_of",
    "find_adapter",
    "find_controlnets",
    "find_denoisers",
    "register_adapter",
]
