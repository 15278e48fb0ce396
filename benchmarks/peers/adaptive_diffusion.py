# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""AdaptiveDiffusion: Training-Free Adaptive Diffusion (arXiv 2410.09873).

The last noise prediction is used again while the third-order difference of the latents is small:
with ``d`` the changes of the latents at the last three steps, while
``|(d[2] + d[0]) / 2 - d[1]| <= threshold * d[1]``, at most ``max_skips`` times in a row (section
3.3). As the authors apply it, ``d`` are mean absolute changes, one number per step; the latents are
those of the scheduler, in its own scale. The first four steps are always computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmagic_tome.lab.methods import Method

from .skipping import Call, History, Peer, as_method, check, mean_abs


def is_stable(changes: Sequence[float], threshold: float) -> bool:
    """Whether the third-order difference is small; three changes, the oldest first."""
    first, second, third = changes
    return abs((third + first) / 2 - second) <= threshold * second


class AdaptiveDiffusion(Peer):
    """See the module.

    Args:
        threshold: of the third-order difference, relative.
        max_skips: in a row; 0 skips nothing.
    """

    def __init__(self, threshold: float = 0.01, max_skips: int = 4) -> None:
        check("threshold", threshold, 0)
        check("max_skips", max_skips, 0)
        self.threshold, self.max_skips = threshold, max_skips
        self.latents: Tensor | None = None
        self.changes: list[float] = []
        self.in_a_row = 0

    def stepped(self, call: Call, output: Tensor, latents: Tensor) -> None:
        if self.latents is not None:
            self.changes.append(mean_abs(latents - self.latents))
        self.latents = latents

    def skips(self, call: Call, history: History) -> bool:
        skip = (
            len(self.changes) >= 3
            and self.in_a_row < self.max_skips
            and is_stable(self.changes[-3:], self.threshold)
        )
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    def estimate(self, call: Call, history: History) -> Tensor:
        return history.outputs[-1]


def method(threshold: float = 0.01, max_skips: int = 4, name: str | None = None) -> Method:
    """AdaptiveDiffusion; options of the class."""
    name = name or f"AdaptiveDiffusion {threshold:g}"
    return as_method(name, lambda: AdaptiveDiffusion(threshold, max_skips))
