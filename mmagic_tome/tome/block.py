# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The plans of a block: made from the tokens that enter it, and how long they are reused."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ToMeError
from ..merging.frames import FramePlan, as_clips
from ..merging.joint import split_sequence
from ..methods import PlanRequest
from ..schedules import Place
from .network import StepHook
from .state import BlockState, TomeContext, TomePatch


class BlockPreHook(StepHook):
    """Make the plans that the targets of a block share."""

    def __init__(self, patch: TomePatch, block: BlockState) -> None:
        super().__init__(patch)
        self.block = block

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        patch, block = self.patch, self.block
        context = patch.context
        context.plans = {}
        config = context.config if context.running else patch.config
        if config is None:
            return
        if not context.running and (config.merges_nothing or context.disabled):
            return
        tokens = args[0] if args else kwargs["hidden_states"]
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            context.plans = self.plans(context, tokens)
            return
        made_for, plans, before = block.saved.get(tokens, (None, None, None))
        if made_for is config:
            context.num_before = before
        else:
            plans = self.plans(context, tokens)
            block.saved[tokens] = (config, plans, context.num_before)
        context.plans = plans

    def plans(self, context: TomeContext, tokens: Tensor) -> dict[str, Any]:
        """Plans by kind of target, from (B, N, C) tokens or a (B, C, h, w) image of them."""
        block, config = self.block, context.config
        metric = self.image_tokens(context, tokens)
        if config.one_plan:
            return dict.fromkeys(block.kinds, self.compute(context, metric, config.ratio))
        ratios = dict.fromkeys(block.kinds, config.ratio)
        for kind in () if config.ratio_schedule.constant else block.kinds:
            place = Place(kind, block.downsample, block.depth, block.num_blocks, context.remaining)
            ratios[kind] = config.ratio_schedule(place)
        if config.keeps_plans:
            return self.kept_plans(context, metric, ratios)
        plans, made = {}, {}
        for kind, ratio in ratios.items():
            plans[kind] = self.made_once(context, metric, ratio, made)
        return plans

    def kept_plans(
        self, context: TomeContext, metric: Tensor, ratios: dict[str, float]
    ) -> dict[str, Any]:
        """Plans by kind of target, those of an earlier step where they are reused."""
        block, config, state = self.block, context.config, context.state
        # When a schedule first becomes non-zero there is no earlier plan to reuse.
        begins = any(ratios[kind] > 0 for kind in ratios if (block.name, kind) in state.unmerged)
        due = config.plan_is_due(state.computed_at.get(block.name, -1), context.step)
        computes = begins or due
        if computes:
            state.computed_at[block.name] = context.step
        plans, made = {}, {}
        for kind, ratio in ratios.items():
            owner = (block.name, kind)
            # Also where a plan would still be reused: a schedule ends at the step it names.
            if ratio <= 0 or computes or owner not in state.plans:
                state.plans[owner] = self.made_once(context, metric, ratio, made)
            plans[kind] = state.plans[owner]
            (state.unmerged.discard if ratio > 0 else state.unmerged.add)(owner)
        return plans

    def image_tokens(self, context: TomeContext, tokens: Tensor) -> Tensor:
        """(B, N, C) tokens of the image, or of whole clips, out of what enters the block; ToMeError
        if the grid is not known, or does not fit."""
        block = self.block
        if not context.running or context.grid is None:
            raise ToMeError(
                f"{block.name} was called outside a forward of its network, so the token grid is "
                "not known. Call the network; for gradient checkpointing, write "
                "use_reentrant=False (diffusers' default)"
            )
        height, width = context.grid
        if tokens.dim() == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if context.frames > 1:
            tokens = as_clips(tokens, context.frames)
        text = tokens.shape[1] - height * width
        if text == 0:
            return tokens
        if block.joint and text > 0:
            before = text if context.num_before is None else context.num_before
            return split_sequence(tokens.detach(), text, before)[1]
        raise ToMeError(
            f"{block.name} was given {tokens.shape[1]} tokens for a grid of {height}x{width}; "
            "token merging needs one token per grid place"
        )

    def made_once(
        self, context: TomeContext, metric: Tensor, ratio: float, made: dict[float, Any]
    ) -> Any:
        """The plan at a ratio, which is computed if it is not among those ``made`` in this call."""
        if ratio not in made:
            made[ratio] = self.compute(context, metric, ratio)
        return made[ratio]

    def compute(self, context: TomeContext, metric: Tensor, ratio: float) -> Any:
        """A new plan; None if there is nothing to merge."""
        if ratio <= 0:
            return None
        patch, block, config = self.patch, self.block, context.config
        height, width = context.grid
        sx, sy = config.cell_of(height, width, block.kinds)
        request = PlanRequest(
            height=height,
            width=width,
            sx=sx,
            sy=sy,
            level=block.level,
            exact=config.exact_matching,
            layout=partial(patch.layout, context, block, metric.device),
        )
        plan = config.merge_method.plan(metric.detach(), ratio, request)
        if plan is None:
            return None
        if not torch.compiler.is_compiling():
            block.plans += 1
        return FramePlan(plan, context.frames) if context.frames > 1 else plan
