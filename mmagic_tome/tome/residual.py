# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Add what merging lost at the last step that computed a plan.

::

    step that computes a plan    D = f(x)                    used as it is
                                 R = D - U(f(M x))           what merging loses
    steps in between             U(f(M x)) + R

M merges, U unmerges. Extrapolating R along the timestep, and a residual without a second run of f,
were measured and lose (``docs/research/merging.md``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .network import StepHook
from .target import TargetHook, with_tokens


class ResidualPreHook(StepHook, TargetHook):
    """Run unmerged where a plan is computed; merge in between."""

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        context, target = self.patch.context, self.target
        x = args[0] if args else kwargs["hidden_states"]
        plan = context.plans.get(target.kind)
        if plan is not None and target.joint:
            plan = self.joint(plan, x, plan.num_tokens)
        known = target.name in context.state.residuals and not context.computes
        # With gradients, as in training, steps are unrelated: merged without a residual.
        if plan is None or not (known or torch.is_grad_enabled()):
            target.record(context, x, None)
            context.pending[target.name] = ("baseline", plan, x, args, kwargs)
            return None
        target.record(context, x, plan)
        args, kwargs, merged = self.merge(plan, x, args, kwargs)
        context.pending[target.name] = ("merged", plan, x, merged)
        return args, kwargs


class ResidualPostHook(StepHook, TargetHook):
    """Note the residual, or add it."""

    after = True

    def run(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        context, target = self.patch.context, self.target
        if target.name not in context.pending:
            return None
        if target.last:
            context.plans = {}
        how, plan, x, *rest = context.pending.pop(target.name)
        residuals, out = context.state.residuals, target.tokens_of(output)
        if how == "merged":
            y = self.unmerged(plan, x, *rest, out)
            if not torch.is_grad_enabled():
                y = y + residuals[target.name]
            return target.replaced(output, y)
        # Where nothing was merged there is no residual to add.
        residuals.pop(target.name, None)
        if plan is not None:
            residuals[target.name] = out - self.merged_output(plan, x, *rest)
        return None

    def unmerged(self, plan: Any, x: Tensor, merged: Tensor | None, out: Tensor) -> Tensor:
        """What a merged run gives all tokens."""
        if self.target.kind == "attn_kv":
            return out
        if self.target.whole:
            return x + plan.unmerge(out - merged)
        return plan.unmerge(out)

    def merged_output(self, plan: Any, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The target once more, on merged tokens, past the hooks that are in the middle of it."""
        context, target = self.patch.context, self.target
        args, kwargs, merged = self.merge(plan, x, args, kwargs)
        pending, plans = dict(context.pending), context.plans
        y: Any = None
        for number, path in enumerate(target.paths):
            if number:
                args, kwargs = with_tokens(y, args, kwargs)
            y = target.tokens_of(context.network.get_submodule(path).forward(*args, **kwargs))
        context.pending, context.plans = pending, plans
        return self.unmerged(plan, x, merged, y)
