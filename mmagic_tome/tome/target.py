# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merge the tokens that go into a target, unmerge those that come out.

Around a block or a stack, whose output is its input plus a change, the change is merged and not the
tokens: x + U(f(M x) - M x), where M merges and U unmerges. What flows past the block keeps its
detail.

Of keys and values nothing is unmerged: all queries stay. Attention that takes no tokens for them
merges them after projection, see :class:`~mmagic_tome.merging.keys.AttentionKeys`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ToMeError
from ..merging.joint import JointPlan
from ..merging.keys import AttentionKeys
from ..merging.proportional import log_sizes
from ..patch import Hook, Interceptor
from .network import StepHook
from .state import Target, TomePatch


class TargetHook(Hook):
    """Base class of the hooks around a target."""

    def __init__(self, patch: TomePatch, target: Target) -> None:
        super().__init__(patch)
        self.target = target

    def plan_of(self, x: Tensor, merged: bool = False) -> Any:
        """The plan for tokens ``x``, which are merged or not; None where nothing is merged. In a
        joint sequence ``x`` contains the text as well."""
        context = self.patch.context
        plan = context.plans.get(self.target.kind)
        if plan is None or not self.target.joint:
            return plan
        of_image = plan.num_slots if merged else plan.num_tokens
        return JointPlan(plan, x.shape[1] - of_image, context.num_before)

    def merge(
        self, module: nn.Module, plan: Any, x: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> tuple:
        """(args, kwargs) of a call of the target's first module on merged tokens, and these tokens;
        ToMeError, which says what to write instead, if the call cannot be merged."""
        target, keys = self.target, self.patch.context.keys
        inside = self.merges_inside(module)
        self._check_call(plan, x, args, kwargs, inside)
        # With a context of its own, as attention injection has, the keys are not what is merged.
        own_keys = target.bias is not None and kwargs.get(target.context_argument) is not None
        if target.weighs and not own_keys and not perturbs(module):
            # softmax then counts a merged key as often as it represents tokens.
            keys.log_size = log_sizes(plan.size, x.dtype)
            keys.masked = target.bias is not None and not inside
            if keys.masked:
                kwargs = {**kwargs, target.bias: keys.log_size.to(x.dtype)[:, None]}
        if inside:
            keys.plan = plan
            return args, kwargs, None
        merged = plan.merge(x)
        if target.kind == "attn_kv":
            return args, {**kwargs, target.context_argument: merged}, None
        args, kwargs = with_tokens(merged, args, kwargs)
        return *self.patch.adapter.adapt(target.name, plan, args, kwargs), merged

    def merges_inside(self, module: nn.Module) -> bool:
        """Whether keys and values are merged after projection, inside of the attention."""
        target = self.target
        if target.kind != "attn_kv":
            return False
        # One projection of queries, keys and values needs the same tokens for all three.
        return target.context_argument is None or getattr(module, "fused_projections", False)

    def _check_call(
        self, plan: Any, x: Tensor, args: tuple, kwargs: dict[str, Any], inside: bool
    ) -> None:
        target = self.target
        name, kind = target.name, target.kind
        self.patch.adapter.check(name, args, kwargs)
        if x.shape[1] != plan.num_tokens or x.shape[0] != plan.batch:
            raise ToMeError(
                f"{name} was given {tuple(x.shape[:2])} (batch, tokens) but its block has "
                f"({plan.batch}, {plan.num_tokens}): chunked feed-forward cannot be merged; call "
                "disable_forward_chunking() or leave 'mlp' out of targets"
            )
        masked = kwargs.get("attention_mask") is not None and not self.patch.adapter.takes_masks
        # Where keys are merged after projection, their mask is merged with them.
        if masked and kind != "mlp" and not inside:
            memory = kwargs.get("encoder_hidden_states")
            of_image = memory is None or memory.shape[1] == plan.num_tokens
            if target.whole or (kind != "crossattn" and of_image):
                raise ToMeError(
                    f"{name} was given an attention_mask over image tokens, which has no meaning "
                    "for merged tokens; call the model without it or leave this target out"
                )
        if kind == "crossattn" or target.whole:
            more = kwargs.get("cross_attention_kwargs") or {}
            if kwargs.get("ip_adapter_masks", more.get("ip_adapter_masks")) is not None:
                raise ToMeError(
                    f"{name} was given ip_adapter_masks, which cover the token grid and do not fit "
                    "merged tokens; merge self-attention only"
                )


class TargetPreHook(TargetHook):
    """Merge what goes into the first module of a target; for a block or stack, keep it for the
    change that comes out."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        context, target = self.patch.context, self.target
        x = args[0] if args else kwargs["hidden_states"]
        plan = None if self.has_other_keys(module, kwargs) else self.plan_of(x)
        target.record(context, x, plan)
        if plan is None:
            return None
        args, kwargs, merged = self.merge(module, plan, x, args, kwargs)
        if target.whole:
            context.pending[target.name] = (plan, x, merged)
        return args, kwargs

    def has_other_keys(self, module: nn.Module, kwargs: dict[str, Any]) -> bool:
        """Whether keys and values are not those of the block's tokens, and are not merged: a
        warning, or a ToMeError where they were asked for."""
        target, patch = self.target, self.patch
        if target.kind != "attn_kv":
            return False
        if perturbs(module):
            what = "has keys for a part of the batch only (perturbed attention guidance)"
        elif target.context_argument and kwargs.get(target.context_argument) is not None:
            what = "takes keys and values from other tokens (attention_injection)"
        else:
            return False
        said = f"{target.name} {what}, which {{}} merge; to merge queries write targets=['attn']"
        if patch.config.targets != "auto":
            raise ToMeError(said.format("the image's plan cannot"))
        patch.warn_once("other keys", said.format("do not"))
        return True


class TargetPostHook(TargetHook):
    """Unmerge what comes out of the last module of a target."""

    after = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        context, target = self.patch.context, self.target
        merges = target.kind != "attn_kv" and context.plans.get(target.kind) is not None
        plan = self.plan_of(target.tokens_of(output), merged=True) if merges else None
        if target.last:
            # The block's feed-forward needs the memory.
            context.plans = {}
        if plan is None:
            return None
        return target.replaced(output, plan.unmerge(target.tokens_of(output)))


class WholePreHook(StepHook, TargetPreHook):
    """:class:`TargetPreHook` of a block or stack."""

    run = TargetPreHook.__call__


class WholePostHook(TargetHook, StepHook):
    """Add the unmerged change of a block or stack to the tokens that went in."""

    after = True

    def run(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        context, target = self.patch.context, self.target
        context.plans = {}
        plan, x, merged = context.pending.pop(target.name, (None, None, None))
        if plan is None:
            return None
        change = plan.unmerge(target.tokens_of(output) - merged)
        return target.replaced(output, x + change)


class SharedInputPreHook(TargetHook):
    """Merge the same tokens for a further module of a target; counted where the target begins."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        plan = self.plan_of(x)
        return None if plan is None else with_tokens(plan.merge(x), args, kwargs)


class MergeKeys(Interceptor):
    """Around an attention whose keys are weighed or merged, see :class:`AttentionKeys`. Its
    target's hooks run inside, and say by what."""

    skips = True

    def __init__(self, patch: TomePatch, target: Target) -> None:
        super().__init__(patch)
        self.target = target

    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        keys = self.patch.context.keys = AttentionKeys(self.target.image_last)
        with keys:
            output = proceed(module, *args, **kwargs)
        if keys.plan is not None or (keys.log_size is not None and not keys.masked):
            self.missed(keys.plan is not None)
        elif not (self.target.merged_inside or torch.compiler.is_compiling()):
            self.target.merged_inside = True
        return output

    def missed(self, merging: bool) -> None:
        """ToMeError or warning: the attention did not let its keys be merged or weighed."""
        config, target = self.patch.config, self.target
        if target.merged_inside:  # another hook skipped a call, as attention broadcast does
            return
        found = f"{target.name} does not call scaled_dot_product_attention, so its keys "
        if merging:
            instead = "; use the model's default attention, or write targets=['attn']"
            if config.targets != "auto" or config.prop_attn is True:
                raise ToMeError(f"{found}and values cannot be merged{instead}")
            target.missed()
            self.patch.warn_once("unmerged", f"{found}and values stay unmerged{instead}")
            return
        instead = "; use the model's default attention, or write prop_attn=False"
        if config.prop_attn is True:
            raise ToMeError(f"{found}cannot be weighed{instead}")
        said = f"{found}are not weighed and merging loses more detail{instead}"
        self.patch.warn_once("unweighed", said)


def perturbs(module: nn.Module) -> bool:
    """Whether an attention runs on a part of its batch, for perturbed attention guidance (arXiv
    2403.17377); such processors of diffusers neither take a context nor a mask of the batch."""
    return type(getattr(module, "processor", None)).__name__.startswith("PAG")


def target_hooks(patch: TomePatch, target: Target) -> list[tuple[str, TargetHook]]:
    """(dotted path of a module, hook) of everything around a target."""
    before, after = TargetPreHook, TargetPostHook
    if target.whole:
        before, after = WholePreHook, WholePostHook
    return [
        (target.paths[0], before(patch, target)),
        *((path, SharedInputPreHook(patch, target)) for path in target.shared),
        (target.paths[-1], after(patch, target)),
    ]


def with_tokens(x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a module with other tokens."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
