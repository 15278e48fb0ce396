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


def apply_tome_vit(
    model: nn.Module,
    r: Any = None,
    *,
    target_speedup: float | None = None,
    prop_attn: bool = True,
    metric: str = "keys",
    distance: str = "cosine",
    combination: str = "weighted",
    partition: str = "alternating",
    trace_source: bool = False,
    unmerge: bool | None = None,
    seed: int = 0,
) -> ViTHandle:
    """Merge tokens in every block of a vision transformer from now on, in place.

    The defaults are the best settings of "Token Merging: Your ViT But Faster" (Bolya et al.,
    ICLR 2023, arXiv 2210.09461).

    Args:
        model: one of :data:`~.families.FAMILIES`, or a model that contains one (with a head, CLIP
            with its text model, Whisper with its decoder, DistributedDataParallel).
        r: tokens to remove per block: an int (default 8), ``(r, inflect)`` or a list; see
            :func:`~.schedules.removed_per_block`. A block removes at most half of its tokens.
        target_speedup (float | None): instead of ``r``: the smallest constant r that divides the
            blocks' multiply-adds by this much. It is found for the number of tokens of each
            forward and is then in ``handle.r``. :func:`~.schedules.relative_cost` counts, nothing
            is measured: embedding, head, and merging itself are excluded. Default None.
        prop_attn (bool): proportional attention (default True). The paper needs it for supervised
            models without training, and disables it for masked autoencoders without training.
        metric (str): features to compare: 'keys' (default), 'queries', 'values' (mean over the
            heads), 'features' (the tokens between attention and feed-forward) or 'attention'
            (output of the attention).
        distance (str): 'cosine' (default), 'dot', 'euclidean', 'softmax'.
        combination (str): 'weighted' (default: average weighted by size), 'mean', 'max' or 'drop'
            (the destination stays as it is). Sizes add up in all of them.
        partition (str): 'alternating' (default), 'sequential', 'random' (a hash of ``seed`` and
            block).
        trace_source (bool): record which token contains which patch: ``handle.source``.
        unmerge (bool | None): unmerge the last block's output, so that it has the baseline's shape
            and averages over it count every patch once. None (default): only if what follows reads
            more than the class token: SigLIP, VideoMAE, Whisper, timm with other pooling than
            'token', and heads that average or decode.
        seed (int): of the random partition. Default 0.

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
    config = ViTConfig(
        r=r,
        target_speedup=target_speedup,
        prop_attn=prop_attn,
        metric=metric,
        distance=distance,
        combination=combination,
        partition=partition,
        trace_source=trace_source,
        unmerge=unmerge,
        seed=seed,
    )
    return apply_options(model, config)


def apply_options(
    model: nn.Module, config: ViTConfig | Mapping[str, Any] | None = None, **options: Any
) -> ViTHandle:
    """:func:`apply_tome_vit` with a config: a :class:`ViTConfig`, a dict, or None.

    Args:
        **options: override ``config``.

    Raises:
        ToMeError: an unknown option, or as for :func:`apply_tome_vit`.
    """
    config = ViTConfig.coerce(config, **options)
    vit = find_vit(model)
    constant = config.target_speedup is None
    removed = removed_per_block(config.r, len(vit.blocks)) if constant else None
    prepare_compiler()
    old = find_patch(vit.network, ViTPatch)
    replaced = [] if old is None else hooks.remove(vit.network, old)
    patch = ViTPatch(
        config,
        removed,
        prefix=vit.prefix,
        blocks=[block.name for block in vit.blocks],
        width=vit.blocks[0].norm.normalized_shape[-1],
        hidden=vit.blocks[0].hidden,
        unmerges=vit.reads_all if config.unmerge is None else config.unmerge,
    )
    hooks.register(vit, patch)
    return ViTHandle(vit.network, patch, replaced)


def remove_tome_vit(model: nn.Module) -> bool:
    """Undo :func:`apply_tome_vit`; the model is bit for bit what it was.

    Returns:
        bool: whether there was anything to remove.
    """
    handle = get_vit_handle(model)
    if handle is None:
        return False
    handle.remove()
    return True


def get_vit_handle(model: object) -> ViTHandle | None:
    """Handle of the token merging in a vision transformer, also in a copy; None if none."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        patch = find_patch(module, ViTPatch)
        if patch is not None:
            return ViTHandle(module, patch)
    return None
