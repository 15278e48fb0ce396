# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging in vision transformers, for images, video and sound.

In diffusion models a block's tokens are merged before and unmerged after each of its parts, on a
grid, by the timestep. Here they stay merged from block to block and have a size. The two share
:mod:`~mmagic_tome.patch` and :class:`~mmagic_tome.merging.MergePlan`.

============  ==================================================================
apply.py      apply, inspect, change and remove
config.py     options; tokens to remove per block
families.py   the known models
hooks.py      merging inside of blocks
interface.py  proportional attention in modules that take no attention mask
patch.py      state that the hooks share
registry.py   names in configs of mmengine and mmpretrain
============  ==================================================================
"""

from .apply import ViTHandle, apply_tome_vit, get_vit_handle
from .config import ViTConfig, removed_per_block
from .families import FAMILIES, find_vit

__all__ = [
    "FAMILIES",
    "ViTConfig",
    "ViTHandle",
    "apply_tome_vit",
    "find_vit",
    "get_vit_handle",
    "removed_per_block",
]
