# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging in vision transformers, for pictures, video and sound.

Not a host of :mod:`mmagic_tome.engine`: there a block's tokens are merged before and unmerged
after each of its parts, on a grid, at a noise level; here they stay merged from block to block and
carry a size. What the two share is the :class:`~mmagic_tome.merging.MergePlan`.
"""

from .engine import ViTHandle, apply_tome_vit, get_vit_handle, remove_tome_vit
from .families import FAMILIES
from .schedules import removed_per_block
from .state import ViTOptions

__all__ = [
    "FAMILIES",
    "ViTHandle",
    "ViTOptions",
    "apply_tome_vit",
    "get_vit_handle",
    "remove_tome_vit",
    "removed_per_block",
]
