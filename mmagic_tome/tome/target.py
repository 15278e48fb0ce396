# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merge the tokens that go into a target, unmerge those that come out.

Around a block or a stack, whose output is its input plus a change, the change is merged and not the
tokens: x + U(f(M x) - M x). What flows past the block keeps its detail.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from ..merging.joint import JointPlan
from ..patch import Hook
from .network import StepHook
from .state import Target, TomePatch


class TargetHook(Hook):
    """Base class of the hooks around a target.

    Args:
        patch (TomePatch): of the network.
        target (Target): the target.
    """

    def __init__(self, patch: TomePatch, target: Target) -> None:
        super().__init__(patch)
        self.target = target


class TargetPreHook(TargetHook):
    """Merge what goes into the first module of a target."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        context, target = self.patch.context, self.target
        x = args[0] if args else kwargs["hidden_states"]
        plan = context.plans.get(target.kind)
        if plan is None:
            target.record(context, x, None)
            return None
        if target.joint:
            plan = JointPlan(plan, x.shape[1] - plan.num_tokens, context.num_before)
        target.record(context, x, plan)
        check_call(self.patch, target, plan, x, kwargs)
        return merged_call(self.patch, target, plan, x, args, kwargs)[:2]


class TargetPostHook(TargetHook):
    """Unmerge what comes out of the last module of a target."""

    after = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        context, target = self.patch.context, self.target
        plan = context.plans.get(target.kind)
        if target.last:
            # The block's feed-forward needs the memory.
            context.plans = {}
        if plan is None or target.kind == "attn_kv":
            return None
        y = target.tokens_of(output)
        if target.joint:
            plan = JointPlan(plan, y.shape[1] - plan.num_slots, context.num_before)
        return target.replaced(output, plan.unmerge(y))


class WholePreHook(TargetHook, StepHook):
    """Merge what goes into a block or stack, and keep it for the change that comes out."""

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        context, target = self.patch.context, self.target
        x = args[0] if args else kwargs["hidden_states"]
        plan = context.plans.get(target.kind)
        if plan is None:
            target.record(context, x, None)
            return None
        if target.joint:
            plan = JointPlan(plan, x.shape[1] - plan.num_tokens, context.num_before)
        target.record(context, x, plan)
        check_call(self.patch, target, plan, x, kwargs)
        args, kwargs, merged = merged_call(self.patch, target, plan, x, args, kwargs)
        context.pending[target.name] = (plan, x, merged)
        return args, kwargs


class WholePostHook(TargetHook, StepHook):
    """Add the unmerged change of a block or stack to the tokens that went in."""

    after = True

    def run(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        context, target = self.patch.context, self.target
        context.plans = {}
        plan, x, merged = context.pending.pop(target.name, (None, None, None))
        if plan is None:
            return None
        change = target.tokens_of(output) - merged
        return target.replaced(output, x + plan.unmerge(change))


class SharedInputPreHook(TargetHook):
    """Merge the same tokens for a further module of a target; counted where the target begins."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        context, target = self.patch.context, self.target
        plan = context.plans.get(target.kind)
        if plan is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if target.joint:
            plan = JointPlan(plan, x.shape[1] - plan.num_tokens, context.num_before)
        return with_tokens(plan.merge(x), args, kwargs)


def target_hooks(patch: TomePatch, target: Target) -> list[tuple[str, TargetHook]]:
    """(dotted path of a module, hook) of everything around a target."""
    before, after = TargetPreHook, TargetPostHook
    if patch.config.residual:
        from .residual import ResidualPostHook, ResidualPreHook

        before, after = ResidualPreHook, ResidualPostHook
    elif target.whole:
        before, after = WholePreHook, WholePostHook
    return [
        (target.paths[0], before(patch, target)),
        *((path, SharedInputPreHook(patch, target)) for path in target.shared),
        (target.paths[-1], after(patch, target)),
    ]


def merged_call(
    patch: TomePatch, target: Target, plan: Any, x: Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any], Tensor | None]:
    """Arguments of a module on merged tokens, and these tokens."""
    if target.bias is not None:
        # softmax then counts a merged key as often as it stands for tokens. Inverses of soft
        # merging may have sizes below 0; nothing else comes near to this.
        size = plan.size.float().clamp_min(1e-3).log().to(x.dtype)
        kwargs = {**kwargs, target.bias: size[:, None]}
    merged = plan.merge(x)
    if target.kind == "attn_kv":
        return args, {**kwargs, target.context_argument: merged}, None
    if args:
        args = (merged, *args[1:])
    else:
        kwargs = {**kwargs, "hidden_states": merged}
    args, kwargs = patch.adapter.adapt(target.name, plan, args, kwargs)
    return args, kwargs, merged


def with_tokens(x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a module with other tokens."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": x}


def check_call(
    patch: TomePatch, target: Target, plan: Any, x: Tensor, kwargs: dict[str, Any]
) -> None:
    """Refuse uses of a block that cannot be merged.

    Raises:
        ToMeError: says what to write instead.
    """
    name, kind = target.name, target.kind
    if x.shape[1] != plan.num_tokens or x.shape[0] != plan.batch:
        raise ToMeError(
            f"{name} was given {tuple(x.shape[:2])} (batch, tokens) but its block has "
            f"({plan.batch}, {plan.num_tokens}): chunked feed-forward cannot be merged; call "
            "disable_forward_chunking() or leave 'mlp' out of targets"
        )
    if kind != "mlp" and kwargs.get("attention_mask") is not None and not patch.adapter.takes_masks:
        context = kwargs.get("encoder_hidden_states")
        if target.whole or (
            kind != "crossattn" and (context is None or context.shape[1] == plan.num_tokens)
        ):
            raise ToMeError(
                f"{name} was given an attention_mask over image tokens, which has no meaning for "
                "merged tokens; call the model without it or leave this target out"
            )
    if kind == "attn_kv" and kwargs.get(target.context_argument) is not None:
        raise ToMeError(
            f"{name} takes keys and values from other tokens (only_cross_attention, "
            "attention_injection), which the image's plan cannot merge; write targets=['attn']"
        )
    if kind == "crossattn" or target.whole:
        masks = kwargs.get("ip_adapter_masks")
        if masks is None:
            masks = (kwargs.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
        if masks is not None:
            raise ToMeError(
                f"{name} was given ip_adapter_masks, which cover the token grid and do not fit "
                "merged tokens; merge self-attention only"
            )
