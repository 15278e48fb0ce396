# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Apply token merging to a vision transformer, and remove it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..graphs import prepare_compiler
from ..patch import find_patch
from . import hooks
from .config import ViTConfig
from .families import find_vit
from .handle import ViTHandle
from .patch import ViTPatch
from .schedules import removed_per_block


def apply_tome_vit(model: nn.Module, r: Any = None, **options: Any) -> ViTHandle:
    """Merge tokens in every block of a vision transformer from now on, in place.

    Args:
        model: one of :data:`~.families.FAMILIES`, or a model that contains one (with a head, CLIP
            with its text model, Whisper with its decoder, DistributedDataParallel).
        r: tokens to remove per block, default 8.
        **options: of :class:`ViTConfig`.

    Returns:
        ViTHandle: inspects, changes and removes the merging. It replaces a merging applied before.
        As a context manager it removes on exit and restores what it replaced.

    Raises:
        ToMeError: an invalid option or a model of no known family; nothing is changed then.

    Example:
        >>> model = timm.create_model("vit_small_patch16_224").eval()
        >>> handle = apply_tome_vit(model, r=13)
        >>> logits = model(images)
        >>> print(handle.summary())
    """
    return apply_options(model, r=r, **options)


def apply_options(
    model: nn.Module, config: ViTConfig | Mapping[str, Any] | None = None, **options: Any
) -> ViTHandle:
    """:func:`apply_tome_vit` with a config: a :class:`ViTConfig`, a dict, or None; ``options``
    override it."""
    config = ViTConfig.coerce(config, **options)
    vit = find_vit(model)
    constant = config.target_speedup is None
    removed = removed_per_block(config.r, len(vit.blocks)) if constant else None
    prepare_compiler()
    old = find_patch(vit.network, ViTPatch)
    replaced = [] if old is None else [(vit.network, hooks.remove(vit.network, old))]
    patch = ViTPatch(config, removed, vit)
    hooks.register(vit, patch)
    return ViTHandle([("", vit.network, patch)], replaced)


def remove_tome_vit(model: nn.Module) -> bool:
    """Undo :func:`apply_tome_vit`; the model is bit for bit what it was.

    Returns:
        bool: whether there was anything to remove.
    """
    handle = get_vit_handle(model)
    if handle is not None:
        handle.remove()
    return handle is not None


def get_vit_handle(model: object) -> ViTHandle | None:
    """Handle of the token merging in a vision transformer, also in a copy; None if none."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        patch = find_patch(module, ViTPatch)
        if patch is not None:
            return ViTHandle([("", module, patch)])
    return None
