# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The handle of token merging in a vision transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..base_handle import Handle
from ..errors import ToMeError
from . import hooks
from .patch import ViTPatch
from .schedules import removed_per_block


class ViTHandle(Handle[ViTPatch]):
    """Inspects, changes and removes the token merging of one model; does not keep it alive."""

    _remove, _restore = staticmethod(hooks.remove), staticmethod(hooks.restore)

    @property
    def r(self) -> Any:
        """Tokens to remove per block. Assign to change them from the next forward on; 0 merges
        nothing.

        With ``target_speedup`` the r that was found for the last forward; None before the first.

        Raises:
            ToMeError: on assignment of an invalid r, or after removal.
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
        patch = self._patch
        patch.removed = removed_per_block(value, len(patch.blocks))
        patch.config = patch.config.replace(r=value)

    @property
    def tokens(self) -> list[tuple[int, int]] | None:
        """(before, after) merging of every block in the last forward; None before the first. Like
        :attr:`size` and :attr:`source` it ignores forwards while :meth:`disabled`."""
        return self._patch.tokens

    @property
    def size(self) -> Tensor | None:
        """(B, M) float, number of patches in each token of the last block, after the last forward;
        None if nothing was merged. Rows sum to N."""
        return self._patch.size

    @property
    def source(self) -> Tensor | None:
        """(B, N) int64, the token of the last block that contains each token of the first, after
        the last forward; None without ``trace_source`` or ``unmerge``, or if nothing was merged.
        """
        return self._patch.source

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy values of the last block's merged tokens to all their patches.

        Args:
            y (Tensor): (B, M, C).

        Returns:
            Tensor: (B, N, C).

        Raises:
            ToMeError: sources were not recorded.
        """
        if self.source is None:
            raise ToMeError("apply with trace_source=True and run the model first")
        return hooks.unmerged(y, self.source)

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
