# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""State that the hooks of one vision transformer share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..merging import MergePlan
from ..merging.keys import AttentionKeys
from ..patch import Context, Patch
from .config import ViTConfig, removed_for_speedup, removed_per_block
from .families import ViT


class ViTContext(Context):
    """State of the forward under way, updated from block to block."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: AttentionKeys | None = None  # of the attention that runs
        self.begin([])

    def begin(self, removed: list[int]) -> None:
        """Reset to the state before the first block."""
        self.removed = removed  # tokens to remove per block; empty outside of a forward
        # (B, N) float, number of patches in each token; None before the first merge.
        self.size: Tensor | None = None
        self.source: Tensor | None = None  # (B, N0) int64, the token of each token of the input
        self.metric: Tensor | None = None  # (B, N, C), similarity features of the current block
        self.plan: MergePlan | None = None  # of the current block
        self.tokens: list[tuple[int, int]] = []  # (before, after) of every finished block

    def start(self) -> None:
        super().start()
        self.begin([])

    def stop(self) -> None:
        super().stop()
        self.begin([])


class ViTPatch(Patch):
    """Options, sizes of the model, and results of the last forward with merging enabled, see
    :class:`~.apply.ViTHandle`. ``removed`` are the tokens to remove per block; None:
    ``target_speedup`` chooses them for the number of tokens of each forward."""

    context_type = ViTContext

    def __init__(self, config: ViTConfig, vit: ViT) -> None:
        super().__init__()
        self.prefix = vit.prefix
        self.blocks = [block.name for block in vit.blocks]
        self.width = vit.blocks[0].norm.normalized_shape[-1]
        self.hidden = vit.blocks[0].hidden
        self.unmerges = vit.reads_all if config.unmerge is None else config.unmerge
        self.configure(config)

    def configure(self, config: ViTConfig) -> None:
        """Use other options from the next forward on; ToMeError: r has more entries than there are
        blocks."""
        constant = config.target_speedup is None
        self.removed = removed_per_block(config.r, len(self.blocks)) if constant else None
        self.config = config

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
