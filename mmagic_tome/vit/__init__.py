# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging in vision transformers, for images, video and sound.

In diffusion models a block's tokens are merged before and unmerged after each of its parts, on a
grid, by the timestep. Here they stay merged from block to block and have a size. The two share
:mod:`~mmagic_tome.patch` and :class:`~mmagic_tome.merging.MergePlan`.

================  ==================================================================
apply.py          apply and remove
config.py         options
handle.py         inspecting and changing a merged model
hooks.py          merging inside of blocks
patch.py          state that the hooks share
interface.py      proportional attention in modules that take no attention mask
schedules.py      tokens to remove per block
families/         the known models, one file per library
registry.py       names in configs of mmengine and mmpretrain
================  ==================================================================
"""

from .apply import apply_options, apply_tome_vit, get_vit_handle, remove_tome_vit
from .config import ViTConfig
from .families import FAMILIES, find_vit
from .handle import ViTHandle
from .schedules import removed_per_block

__all__ = [
    "FAMILIES",
    "ViTConfig",
    "ViTHandle",
    "apply_options",
    "apply_tome_vit",
    "find_vit",
    "get_vit_handle",
    "remove_tome_vit",
    "removed_per_block",
]
