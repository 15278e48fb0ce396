# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""State that the hooks of one vision transformer share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..merging.sequence import Match
from ..patch import Context, Patch
from .config import ViTConfig
from .families import ViT
from .schedules import removed_for_speedup


class ViTContext(Context):
    """State of the forward under way, updated from block to block."""

    def __init__(self) -> None:
        super().__init__()
        self.begin([])

    def begin(self, removed: list[int]) -> None:
        """Reset to the state before the first block."""
        #: Tokens to remove per block; empty outside of a forward.
        self.removed = removed
        #: (B, N) float, number of patches in each token; None before the first merge.
        self.size: Tensor | None = None
        #: (B, N0) int64, the token that contains each token of the input.
        self.source: Tensor | None = None
        #: (B, N, C), similarity features of the current block.
        self.metric: Tensor | None = None
        #: Of the current block.
        self.match: Match | None = None
        #: (before, after) of every finished block.
        self.tokens: list[tuple[int, int]] = []

    def start(self) -> None:
        super().start()
        self.begin([])

    def stop(self) -> None:
        super().stop()
        self.begin([])


class ViTPatch(Patch):
    """Options, sizes of the model, and results of the last forward.

    Args:
        config (ViTConfig): the options; assign another to change them between forwards.
        removed (list | None): tokens to remove per block; None: ``target_speedup`` chooses them
            for the number of tokens of each forward.
        vit (ViT): what the hooks are registered on.

    Attributes:
        prefix (int): number of protected tokens.
        blocks (list): dotted paths of the blocks.
        width, hidden (int): channels, also inside the feed-forward.
        unmerges (bool): whether the last block's output is unmerged.
        size, source, tokens: of the last forward with merging enabled, see
            :class:`~.handle.ViTHandle`.
    """

    context_type = ViTContext

    def __init__(self, config: ViTConfig, removed: list[int] | None, vit: ViT) -> None:
        super().__init__()
        self.config = config
        self.removed = removed
        self.prefix = vit.prefix
        self.blocks = [block.name for block in vit.blocks]
        self.width = vit.blocks[0].norm.normalized_shape[-1]
        self.hidden = vit.blocks[0].hidden
        self.unmerges = vit.reads_all if config.unmerge is None else config.unmerge

    def _fresh(self) -> None:
        super()._fresh()
        self._inputs = WeakTensorKeyDictionary()
        self.reset_stats()

    def __getstate__(self) -> dict[str, Any]:
        of_forward = ("_inputs", "size", "source", "tokens")
        return {k: v for k, v in super().__getstate__().items() if k not in of_forward}

    def reset_stats(self) -> None:
        """Forget the results of the last forward."""
        self.size: Tensor | None = None
        self.source: Tensor | None = None
        self.tokens: list[tuple[int, int]] | None = None

    @property
    def traces(self) -> bool:
        """Whether to record which token contains which patch."""
        return self.config.trace_source or self.unmerges

    @property
    def merges(self) -> bool:
        """Whether a forward that begins now would merge anything."""
        return not self.context.disabled and (self.removed is None or any(self.removed))

    def removed_for(self, tokens: int) -> list[int]:
        """Tokens to remove per block in a forward on ``tokens`` tokens."""
        blocks = len(self.blocks)
        if self.context.disabled:
            return [0] * blocks
        if self.removed is not None:
            return self.removed
        sizes = (blocks, tokens, self.prefix, self.width, self.hidden)
        return [removed_for_speedup(self.config.target_speedup, *sizes)] * blocks

    def remember(self, x: Tensor) -> None:
        """Keep this thread's state for as long as ``x``, the input of a block, lives.

        Gradient checkpointing runs a block again in the backward, with the same input tensor, when
        the forward is long over; on a GPU in another thread.
        """
        context = self.context
        self._inputs[x] = (context.removed, context.size, context.source)

    def recall(self, x: Tensor) -> bool:
        """Return to the state that was kept for ``x``; False if there is none."""
        state = self._inputs.get(x)
        if state is None:
            return False
        context = self.context
        context.removed, context.size, context.source = state
        return True
