# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Put token merging into a vision transformer, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from ..graphs import prepare_compiler
from .families import ViT, find_vit
from .hooks import (
    AttentionPreHook,
    BlockPostHook,
    BlockPreHook,
    FirstPreHook,
    LastPostHook,
    MetricHook,
    NormPreHook,
    OutputHook,
    RootPreHook,
)
from .schedules import removed_per_block
from .state import ViTOptions, ViTState


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

    The defaults are what the paper found best: "Token Merging: Your ViT But Faster" (Bolya et
    al., ICLR 2023, arXiv 2210.09461).

    Args:
        model: one of :data:`~.families.FAMILIES`, or a model that has one inside (with a head,
            CLIP with its text model, Whisper with its decoder, DistributedDataParallel).
        r: tokens to remove per block: an int (default 8), ``(r, inflect)`` or a list; see
            :func:`~.schedules.removed_per_block`. No block removes more than half.
        target_speedup (float | None): in place of ``r``: the smallest constant r that divides the
            blocks' multiply-adds by this much, found for the number of tokens of each forward and
            then in ``handle.r``. A count (:func:`~.schedules.relative_cost`), not a measurement:
            embedding, head, and merging itself are not in it. Default None.
        prop_attn (bool): proportional attention (default True). The paper needs it for supervised
            models off the shelf, and has it off for masked autoencoders off the shelf.
        metric (str): what similarity is measured on: 'keys' (default), 'queries', 'values' (mean
            over the heads), 'features' (the tokens between attention and feed-forward) or
            'attention' (output of the attention).
        distance (str): 'cosine' (default), 'dot', 'euclidean', 'softmax'.
        combination (str): 'weighted' (default: average weighted by size), 'mean', 'max' or 'drop'
            (the destination stays as it is). Sizes add up in all of them.
        partition (str): 'alternating' (default), 'sequential', 'random' (a hash of ``seed`` and
            block).
        trace_source (bool): note which token holds which patch: ``handle.source``.
        unmerge (bool | None): copy the last block's merged tokens back to all places, so that the
            output has its dense shape, and averages over it count every patch once. None
            (default): where what follows reads more than the class token: SigLIP, VideoMAE,
            Whisper, timm with other pooling than 'token', and heads that average or decode.
        seed (int): of the random partition. Default 0.

    Returns:
        ViTHandle: to look at, change and remove what was applied. As a context manager it removes
        on exit. Applying again replaces what was applied before; as a context manager that is put
        back on exit.

    Raises:
        ToMeError: an invalid option or a model of no known family; nothing is changed then.

    Example:
        >>> model = timm.create_model("vit_small_patch16_224").eval()
        >>> handle = apply_tome_vit(model, r=13)
        >>> logits = model(images)
        >>> print(handle.summary())
    """
    if r is not None and target_speedup is not None:
        raise ToMeError("write either r or target_speedup, not both")
    vit = find_vit(model)
    options = ViTOptions(
        r=8 if r is None and target_speedup is None else r,
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
    removed = None
    if target_speedup is None:
        removed = removed_per_block(options.r, len(vit.blocks))
    prepare_compiler()
    replaced = get_vit_handle(model)
    if replaced is not None:
        replaced.remove()
    state = ViTState(
        options,
        removed,
        vit.prefix,
        [block.name for block in vit.blocks],
        vit.blocks[0].norm.normalized_shape[-1],
        vit.blocks[0].hidden,
        vit.reads_all if unmerge is None else unmerge,
    )
    _hook(vit, state)
    return ViTHandle(vit.root, state, replaced)


def apply_options(model: nn.Module, options: Mapping[str, Any]) -> ViTHandle:
    """:func:`apply_tome_vit` with options in a dict, as configs have them.

    Raises:
        ToMeError: a name that is no option of it, besides what that raises.
    """
    known = [field.name for field in fields(ViTOptions)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ToMeError(
            f"with r or target_speedup, which are for vision transformers, there is no option "
            f"{unknown[0]!r}; there are {', '.join(known)}"
        )
    return apply_tome_vit(model, **options)


def _hook(vit: ViT, state: ViTState) -> None:
    metric = state.options.metric
    state.hook(vit.root, RootPreHook(state))
    for index, block in enumerate(vit.blocks):
        before = BlockPreHook(state, index)
        state.hook(block.module, before, BlockPostHook(state, index))
        state.hook(block.first, FirstPreHook(before))
        attention = AttentionPreHook(state, index, vit.mask)
        state.hook(block.attention, attention)
        if vit.mask is None:
            state.hooks.append(vit.injection(block.attention, attention))
        if metric in block.sources:
            module, heads = block.sources[metric]
            state.hook(module, after=MetricHook(state, heads))
        elif metric == "attention":
            state.hook(block.output, after=OutputHook(state))
        state.hook(block.norm, NormPreHook(state, index))
        state.hook(block.last, after=LastPostHook(state))


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
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, RootPreHook):
                return ViTHandle(module, hook.state)
    return None


class ViTHandle:
    """What :func:`apply_tome_vit` returns: a view on the token merging of one model."""

    def __init__(self, root: nn.Module, state: ViTState, replaced: ViTHandle | None = None) -> None:
        self.root = root
        self._state = state
        self._replaced = replaced

    @property
    def options(self) -> ViTOptions:
        """The options in force."""
        return self._state.options

    @property
    def r(self) -> Any:
        """Tokens to remove per block. Assign to change them between forwards; 0 is dense.

        With ``target_speedup`` the r that was found for the last forward; None before the first.

        Raises:
            ToMeError: on assignment of something that is no r, or after removal.
        """
        if self._state.options.target_speedup is None or self.tokens is None:
            return self._state.options.r
        # No block removes more than the first.
        before, after = self.tokens[0]
        return before - after

    @r.setter
    def r(self, value: Any) -> None:
        if not self.active:
            raise ToMeError("this token merging was removed or replaced; its r changes nothing")
        removed = removed_per_block(value, len(self._state.blocks))
        self._state.removed = removed
        self._state.options = replace(self._state.options, r=value, target_speedup=None)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The dense model, bit for bit, while entered; all hooks stay in place."""
        state = self._state
        held = state.options, state.removed
        state.options = replace(state.options, r=0, target_speedup=None)
        state.removed = [0] * len(state.blocks)
        try:
            yield
        finally:
            state.options, state.removed = held

    @property
    def active(self) -> bool:
        """False once this merging was removed or replaced by another."""
        return bool(self._state.hooks)

    @property
    def tokens(self) -> list[tuple[int, int]] | None:
        """(before, after) merging of every block in the last forward; None before the first."""
        return self._state.tokens

    @property
    def size(self) -> Tensor | None:
        """(B, M) float, the patches that each token of the last block stands for, after the last
        forward; None if nothing was merged. Rows sum to N."""
        return self._state.size

    @property
    def source(self) -> Tensor | None:
        """(B, N) int64, the token of the last block that holds each token of the first, after
        the last forward; None without ``trace_source`` or ``unmerge``, or if nothing was merged.
        """
        return self._state.source

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy what was computed for the last block's merged tokens back to all places.

        Args:
            y (Tensor): (B, M, C).

        Returns:
            Tensor: (B, N, C).

        Raises:
            ToMeError: it was not noted where tokens came from.
        """
        if self.source is None:
            raise ToMeError("apply with trace_source=True and run the model first")
        return y.gather(1, self.source[..., None].expand(-1, -1, y.shape[-1]))

    def remove(self) -> None:
        """Take token merging out of the model again; a second call does nothing."""
        self._state.remove()

    def summary(self) -> str:
        """A table to print: tokens of every block in the last forward."""
        options, state = self.options, self._state
        amount = f"r={options.r!r}"
        if options.target_speedup is not None:
            amount = f"target_speedup={options.target_speedup:g} of the multiply-adds"
            if state.tokens is not None:
                amount += f", r={self.r}"
        text = (
            f"token merging in {type(self.root).__name__}: {amount}, "
            f"{'' if options.prop_attn else 'no '}proportional attention, {options.distance} "
            f"similarity of {options.metric}"
        )
        if not self.active:
            return f"{text} (removed)"
        if state.tokens is None:
            return f"{text} (not run yet)"
        rows = [
            f"{name}  {before} -> {after}"
            for name, (before, after) in zip(state.blocks, state.tokens)
        ]
        return "\n".join([text, *rows])

    def __enter__(self) -> ViTHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # One that was removed or replaced in the meantime has nothing to undo.
        if not self.active:
            return
        self.remove()
        if self._replaced is not None:
            _hook(find_vit(self.root), self._replaced._state)

    def __repr__(self) -> str:
        removed = "" if self.active else ", removed"
        return f"ViTHandle({type(self.root).__name__}, r={self.r!r}{removed})"
