# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Plans across the frames of a clip, for models whose batch entries are frames."""

from __future__ import annotations

from torch import Tensor

from .plan import Plan


class FramePlan:
    """Merges F frames of N tokens each to one sequence per clip: (B * F, N, C) -> (B, M, C).

    A module that receives the merged tokens sees the frames of a clip together. Cross-attention
    and feed-forward process every token alone, so for them nothing changes. Self-attention joins
    the frames: every token also attends to those of the other frames, as in VidToMe (arXiv
    2312.10656, section 3.2). Its matrix products then cost ``F * (1 - ratio)**2`` times those of
    the unmerged frames, which is less only above a ratio of ``1 - F**-0.5``.

    Args:
        plan (Plan): of B clips with F * N tokens each; token n of frame f is number f * N + n.
        num_frames (int): F, at least 1.
    """

    __slots__ = ("batch", "num_frames", "num_slots", "num_tokens", "plan")

    def __init__(self, plan: Plan, num_frames: int) -> None:
        self.plan = plan
        self.num_frames = num_frames
        self.batch = plan.batch * num_frames
        self.num_tokens = plan.num_tokens // num_frames
        self.num_slots = plan.num_slots

    @property
    def slot(self) -> Tensor:
        return self.plan.slot

    @property
    def size(self) -> Tensor:
        return self.plan.size

    @property
    def representative(self) -> Tensor:
        return self.plan.representative

    def merge(self, x: Tensor) -> Tensor:
        return self.plan.merge(as_clips(x, self.num_frames))

    def unmerge(self, y: Tensor) -> Tensor:
        return self.plan.unmerge(y).reshape(self.batch, self.num_tokens, y.shape[-1])


def as_clips(x: Tensor, num_frames: int) -> Tensor:
    """(B * F, N, C) -> (B, F * N, C): the tokens of a clip's frames one after the other."""
    return x.reshape(x.shape[0] // num_frames, num_frames * x.shape[1], x.shape[2])
