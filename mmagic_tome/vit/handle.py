# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The handle of token merging in a vision transformer."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from ..patch import find_patch
from . import hooks
from .config import ViTConfig
from .patch import ViTPatch
from .schedules import removed_per_block


class ViTHandle:
    """Inspects, changes and removes the token merging of one model; does not keep it alive."""

    def __init__(
        self, network: nn.Module, patch: ViTPatch, replaced: list[tuple[str, Any]] | None = None
    ) -> None:
        self._network = weakref.ref(network)
        self._patch = patch
        self._replaced = replaced or []

    @property
    def network(self) -> nn.Module | None:
        """The vision transformer; None once it is gone."""
        return self._network()

    @property
    def config(self) -> ViTConfig:
        """The options in force."""
        return self._patch.config

    @property
    def active(self) -> bool:
        """False once this merging was removed or replaced by another."""
        network = self.network
        return network is not None and find_patch(network, ViTPatch) is self._patch

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
        """(before, after) merging of every block in the last forward; None before the first."""
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
        return y.gather(1, self.source[..., None].expand(-1, -1, y.shape[-1]))

    def remove(self) -> None:
        """Remove token merging from the model; a second call does nothing."""
        if self.active:
            hooks.remove(self.network, self._patch)

    def disabled(self) -> AbstractContextManager[None]:
        """Context manager: the baseline model in this thread, bit for bit; hooks stay in place.
        Forwards in it leave :attr:`tokens`, :attr:`size` and :attr:`source` as they are."""
        return self._patch.disabled()

    def reset_stats(self) -> None:
        """Forget :attr:`tokens`, :attr:`size` and :attr:`source`."""
        self._patch.reset_stats()

    def reset_run(self) -> None:
        """Do nothing: forwards of a vision transformer are unrelated, and nothing is kept."""

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

    def summary(self) -> str:
        """A table to print: tokens of every block in the last forward."""
        text = f"token merging in {self._where}: {self.description}"
        if not self.active:
            return f"{text} (removed)"
        if self.tokens is None:
            return f"{text} (not run yet)"
        rows = [f"{row['block']}  {row['tokens']} -> {row['kept']}" for row in self.stats()]
        return "\n".join([text, *rows])

    @property
    def _where(self) -> str:
        network = self.network
        return "a model that is gone" if network is None else type(network).__name__

    def __enter__(self) -> ViTHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # If another merging replaced this one, that one decides what is restored.
        if self.active:
            self.remove()
            hooks.restore(self.network, self._replaced)

    def __repr__(self) -> str:
        removed = "" if self.active else ", removed"
        return f"ViTHandle({self._where}, r={self.r!r}{removed})"
