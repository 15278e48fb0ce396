# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Apply token merging to a vision transformer; its handle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..base_handle import Handle
from ..errors import ToMeError
from ..graphs import prepare_compiler
from ..merging.plan import gather_tokens
from ..patch import find_patch
from . import hooks
from .config import ViTConfig
from .families import find_vit
from .patch import ViTPatch


def apply_tome_vit(
    model: nn.Module, config: ViTConfig | Mapping[str, Any] | None = None, **options: Any
) -> ViTHandle:
    """Merge tokens in every block of a vision transformer from now on, in place.

    Args:
        model: one of :data:`~.families.FAMILIES`, or a model that contains one (with a head, CLIP
            with its text model, Whisper with its decoder, DistributedDataParallel).
        config: a :class:`ViTConfig`, a dict of its options, or None: r=8.
        **options: of :class:`ViTConfig`; they override ``config``.

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
    config = ViTConfig.coerce(config, **options)
    vit = find_vit(model)
    patch = ViTPatch(config, vit)
    prepare_compiler()
    old = find_patch(vit.network, ViTPatch)
    replaced = [] if old is None else [(vit.network, hooks.remove(vit.network, old))]
    hooks.register(vit, patch)
    return ViTHandle([("", vit.network, patch)], replaced)


def get_vit_handle(model: object) -> ViTHandle | None:
    """Handle of the token merging in a vision transformer, also in a copy; None if none."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        patch = find_patch(module, ViTPatch)
        if patch is not None:
            return ViTHandle([("", module, patch)])
    return None


class ViTHandle(Handle[ViTPatch]):
    """Inspects, changes and removes the token merging of one model; does not keep it alive.

    ``tokens``, ``size`` and ``source`` are of the last forward that was not :meth:`disabled`.
    """

    _remove, _restore = staticmethod(hooks.remove), staticmethod(hooks.restore)

    @property
    def r(self) -> Any:
        """Tokens to remove per block. Assign to change them from the next forward on; 0 merges
        nothing. ToMeError: an invalid r, or after removal.

        With ``target_speedup`` the r that was found for the last forward; None before the first.
        """
        if self.config.target_speedup is None or self.tokens is None:
            return self.config.r
        # The first block removes the most.
        before, after = self.tokens[0]
        return before - after

    @r.setter
    def r(self, value: Any) -> None:
        if not self.active:
            raise ToMeError("this token merging was removed or replaced; its r changes nothing")
        self._patch.configure(self.config.replace(r=value))

    @property
    def tokens(self) -> list[tuple[int, int]] | None:
        """(before, after) merging of every block; None before the first forward."""
        return self._patch.tokens

    @property
    def size(self) -> Tensor | None:
        """(B, M) float, number of patches in each token of the last block; None if nothing was
        merged. Rows sum to N."""
        return self._patch.size

    @property
    def source(self) -> Tensor | None:
        """(B, N) int64, the token of the last block that contains each token of the first; None
        without ``trace_source`` or ``unmerge``, or if nothing was merged."""
        return self._patch.source

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy values of the last block's merged tokens to all their patches: (B, M, C) ->
        (B, N, C). ToMeError: sources were not recorded."""
        if self.source is None:
            raise ToMeError("apply with trace_source=True and run the model first")
        return gather_tokens(y, self.source)

    def stats(self) -> list[dict[str, Any]]:
        """One dict per block: ``block`` (dotted path), ``tokens`` and ``kept`` (their counts before
        and after merging in the last forward; None before the first)."""
        blocks = self._patch.blocks
        counts = self.tokens or [(None, None)] * len(blocks)
        return [
            {"block": block, "tokens": before, "kept": after}
            for block, (before, after) in zip(blocks, counts)
        ]

    @property
    def description(self) -> str:
        """The options in a few words."""
        config = self.config
        amount = f"r={config.r!r}"
        if config.target_speedup is not None:
            amount = f"target_speedup={config.target_speedup:g} of the multiply-adds"
            if self.tokens is not None:
                amount += f", r={self.r}"
        return (
            f"{amount}, {'' if config.prop_attn else 'no '}proportional attention, "
            f"{config.distance} similarity of {config.metric}"
        )
