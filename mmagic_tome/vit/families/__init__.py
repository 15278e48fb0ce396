# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The known vision transformers, one file per library.

No library is imported: a model of a library that is not imported cannot exist.
"""

from __future__ import annotations

import re

from torch import nn

from ...errors import ToMeError
from .base import Heads, ViT, ViTBlock
from .mmpretrain import MMPretrainViT
from .timm import TimmViT
from .transformers import TRANSFORMERS

__all__ = ["FAMILIES", "Heads", "ViT", "ViTBlock", "find_vit"]

FAMILIES = (*TRANSFORMERS, TimmViT(), MMPretrainViT())

# Class names -> why these models cannot be merged.
_UNSUPPORTED = {
    r"DINOv3ViT\w*|Eva": "rotates queries and keys by position, which merged tokens do not have",
    r"Beit\w*|Data2VecVision\w*": "adds a bias to every pair of positions",
    r"(Swin|Hiera|Sam2?Vision|VitDet|MaxxVit)\w*": "attends in windows of a grid",
    r"Siglip2\w*": "receives padded images with an attention mask",
}


def find_vit(model: object) -> ViT:
    """The one vision transformer inside ``model``.

    Args:
        model: a module of one of the families, or one that contains it, also wrapped by
            DistributedDataParallel or torch.compile.

    Raises:
        ToMeError: there is none, or several.
    """
    found = []
    if isinstance(model, nn.Module):
        for family in FAMILIES:
            found += [(family, path, network) for path, network in family.find(model)]
    known = ", ".join(family.description for family in FAMILIES)
    if not found:
        raise ToMeError(
            f"no vision transformer to merge in a {type(model).__name__}. "
            f"{_why_unsupported(model)}Supported: {known}. Pass one of these, or a model that has "
            "one inside; for a diffusion model write ratio in place of r"
        )
    if len(found) > 1:
        paths = ", ".join(repr(path) for _, path, _ in found)
        raise ToMeError(
            f"{len(found)} vision transformers in a {type(model).__name__}: {paths}; pass one of "
            "these submodules"
        )
    ((family, path, network),) = found
    try:
        return family.describe(path, network, model)
    except (AttributeError, KeyError) as error:
        # Libraries rename the parts of their models from one major version to the next.
        raise ToMeError(
            f"this {type(network).__name__} is not built as those of transformers 5, timm 1 and "
            f"mmpretrain 1.2 are ({error}); install one of these"
        ) from error


def _why_unsupported(model: object) -> str:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        name = type(module).__name__
        for names, why in _UNSUPPORTED.items():
            if re.fullmatch(names, name):
                return f"{name} {why}. "
    return ""
