# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A plan for the tokens of all frames of a clip, where a model has its frames as batch entries."""

from __future__ import annotations

from torch import Tensor

from .plan import MergePlan


class FramesPlan:
    """Merges (B * F, N, C), frame by frame, to (B, M, C): one sequence per clip.

    A module that is given the merged tokens sees the frames of a clip together. For
    cross-attention and feed-forward, which look at every token alone, that changes nothing.
    Self-attention joins the frames: every token attends to those of the other frames, too, as in
    VidToMe (arXiv 2312.10656, section 3.2). It then costs ``F * (1 - ratio)**2`` of the dense
    one's products, so it pays above a ratio of ``1 - F**-0.5`` only.

    Args:
        plan (MergePlan): of B clips with F * N tokens each; any class with its surface.
        frames (int): F, at least 1.
    """

    __slots__ = ("frames", "plan")

    def __init__(self, plan: MergePlan, frames: int) -> None:
        self.plan = plan
        self.frames = frames

    @property
    def batch(self) -> int:
        """B * F, of what goes in."""
        return self.plan.batch * self.frames

    @property
    def num_tokens(self) -> int:
        """N, of one frame."""
        return self.plan.num_tokens // self.frames

    @property
    def num_slots(self) -> int:
        """M, of a whole clip."""
        return self.plan.num_slots

    @property
    def slot(self) -> Tensor:
        """(B, F * N) int64, the slot of every token of a clip."""
        return self.plan.slot

    @property
    def size(self) -> Tensor:
        """(B, M), how many tokens of a clip each slot holds."""
        return self.plan.size

    @property
    def representative(self) -> Tensor:
        """(B, M) int64, counted through the frames: frame * N + place."""
        return self.plan.representative

    def merge(self, x: Tensor) -> Tensor:
        """(B * F, N, C) -> (B, M, C)."""
        return self.plan.merge(as_clips(x, self.frames))

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, M, C) -> (B * F, N, C)."""
        return self.plan.unmerge(y).reshape(self.batch, self.num_tokens, y.shape[-1])

    def __repr__(self) -> str:
        return f"FramesPlan({self.frames} frames, {self.plan!r})"


def as_clips(x: Tensor, frames: int) -> Tensor:
    """(B * F, N, C) -> (B, F * N, C): the tokens of a clip's frames one after the other."""
    return x.reshape(x.shape[0] // frames, frames * x.shape[1], x.shape[2])
