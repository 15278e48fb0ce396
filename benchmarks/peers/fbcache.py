# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""First-block cache (ParaAttention, diffusers' ``FirstBlockCacheConfig``), on a UNet.

The first block always runs. If what it adds to its input differs from what it added at the last
computed step by less than ``threshold`` (relative, mean absolute values), everything behind it is
skipped: its output plus what the rest added at the last computed step. Blocks of a transformer all
have the same shape. On a UNet the first block is the first down block up to its downsampler, whose
output is of the shape of the features in front of the last normalisation, so that the residual of
everything in between is defined (our reading; the nodes for ComfyUI take the first input block).
Transformers have this method in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab.methods import Method

from .skipping import Call, History, Peer, Skipping, as_method, check, mean_abs


def relative_change(new: Tensor, old: Tensor) -> float:
    """The mean absolute difference, relative to the mean absolute value of ``old``."""
    return mean_abs(new - old) / max(mean_abs(old), 1e-12)


class _Enough(Exception):
    """The first block has run, and the rest is skipped."""


class FBCache(Peer):
    """See the module.

    Args:
        threshold: of the relative change; 0 skips nothing.
        warmup: steps that are computed at first.
        max_skips: in a row. Default: None, any number.
    """

    space = "features"

    def __init__(
        self, threshold: float = 0.1, warmup: int = 1, max_skips: int | None = None
    ) -> None:
        check("threshold", threshold, 0)
        check("warmup", warmup, 0)
        self.threshold, self.warmup, self.max_skips = threshold, warmup, max_skips
        self.in_a_row = 0
        self.skip = False
        self.residual: Tensor | None = None  # of the first block, at the last computed step
        self.rest: dict[int, Tensor] = {}  # branch -> of everything behind it

    def decide(self, call: Call, residual: Tensor) -> bool:
        """Whether to skip the rest, at the first branch's call."""
        old, most = self.residual, self.max_skips
        self.skip = (
            old is not None
            and old.shape == residual.shape
            and call.step >= self.warmup
            and (most is None or self.in_a_row < most)
            and relative_change(residual, old) < self.threshold
        )
        self.in_a_row = self.in_a_row + 1 if self.skip else 0
        if not self.skip:
            self.residual = residual
        return self.skip


class FirstBlockSkipping(Skipping):
    """Runs the network up to the end of its first block, and the rest where it is needed."""

    def __enter__(self) -> FirstBlockSkipping:
        blocks = getattr(self.network, "down_blocks", None)
        if blocks is None:
            raise ToMeError(
                f"{type(self.network).__name__} has no down_blocks; for a transformer write "
                "enable_cache(FirstBlockCacheConfig(threshold=...)) of diffusers"
            )
        super().__enter__()
        self._input = self._output = None
        self._now: tuple[Call, History] | None = None
        first, down = blocks[0], getattr(blocks[0], "downsamplers", None)
        begin = first.register_forward_pre_hook(self._begin_block, with_kwargs=True)
        if down:
            end = down[0].register_forward_pre_hook(lambda module, args: self._end_block(args[0]))
        else:
            end = first.register_forward_hook(
                lambda module, args, result: self._end_block(result[0])
            )
        self._undo += [begin.remove, end.remove]
        return self

    def _begin_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._input = args[0] if args else kwargs["hidden_states"]

    def _end_block(self, output: Tensor) -> None:
        self._output = output
        call, history = self._now
        if not call.branch:
            self.peer.decide(call, output - self._input)
        if self.peer.skip and history.steps:
            raise _Enough

    def answer(self, call: Call, history: History, forward: Callable[[], Any]) -> Any:
        self._now = call, history
        try:
            result = forward()
        except _Enough:
            estimate = self._output + self.peer.rest[call.branch]
            return self.skipped(call, estimate, "first block")
        self.note(call, history, result)
        self.peer.rest[call.branch] = history.outputs[-1] - self._output
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._input = self._output = self._now = None


def method(threshold: float = 0.1, name: str | None = None, **options: Any) -> Method:
    """First-block cache; options of :class:`FBCache`."""
    name = name or f"FBCache {threshold:g}"
    return as_method(name, lambda: FBCache(threshold, **options), FirstBlockSkipping)
