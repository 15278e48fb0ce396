# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Hooks around and inside the blocks of a merged vision transformer.

Tokens merge between attention and feed-forward. But a block adds the output of its feed-forward to
the feed-forward's input in the middle of its own code, which no hook reaches. So the tokens are
merged in front of the feed-forward, its output is unmerged, and the block's output is merged again
by the same plan. With M for merge, U for unmerge and f for norm and feed-forward::

    M(x + U f(M x)) = M x + f(M x)

This is exact, since M is linear (or a maximum, or a choice) in every slot and U f is the same for
all tokens of a slot. It costs one more addition and merge of (B, N, C), little beside the matrix
products. Dropout behind the feed-forward draws for every token, so a slot's value is then the
average of several draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import patch as patches
from ..errors import ToMeError
from ..merging.keys import AttentionKeys
from ..merging.plan import gather_tokens
from ..merging.proportional import log_sizes
from ..merging.sequence import combine, match_tokens, total_size
from ..patch import Hook
from .families import ViT
from .interface import ConfigProxy, Injection
from .patch import ViTPatch


def register(vit: ViT, patch: ViTPatch) -> None:
    """Register the hooks of a patch on a vision transformer."""
    patches.register(vit.network, NetworkPreHook(patch))
    patches.register(vit.network, NetworkPostHook(patch))
    for index, block in enumerate(vit.blocks):
        attention = AttentionPreHook(patch, index, vit.mask)
        merge = MergePreHook(patch, index)
        paths = {module: path for path, module in block.module.named_modules()}
        inner = {paths[block.attention]: attention, paths[block.norm]: merge}
        patches.register(block.module, BlockPreHook(patch, index, inner))
        patches.register(block.module, BlockPostHook(patch, index))
        patches.register(block.first, FirstPreHook(patch, index))
        patches.register(block.attention, attention)
        if patch.config.prop_attn:
            patches.intercept(block.attention, WeighKeys(patch))
        if not isinstance(vit.mask, str):
            vit.mask.inject(block.attention, attention)
        metric = patch.config.metric
        if metric in block.sources:
            module, third = block.sources[metric]
            patches.register(module, MetricPostHook(patch, block.head_dim, third))
        elif metric == "attention":
            patches.register(block.output, MetricPostHook(patch))
        patches.register(block.norm, merge)
        patches.register(block.last, UnmergePostHook(patch))


def remove(network: nn.Module, patch: ViTPatch) -> list[tuple[str, Any]]:
    """Take a patch out of a network, exactly; return what :func:`restore` needs."""
    removed = patches.remove(network, patch)
    for module, hook in _injected(network, removed):
        hook.mask.eject(module)
    return removed


def restore(network: nn.Module, removed: list[tuple[str, Any]]) -> None:
    """Undo :func:`remove`."""
    patches.restore(network, removed)
    for module, hook in _injected(network, removed):
        hook.mask.inject(module, hook)


def _injected(network: nn.Module, removed: list[tuple[str, Any]]) -> list[tuple[nn.Module, Any]]:
    """The modules that have an attribute replaced, and their hooks."""
    return [
        (network.get_submodule(path), hook)
        for path, hook in removed
        if not isinstance(getattr(hook, "mask", ""), str)
    ]


class NetworkPreHook(Hook):
    """Start of a forward."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        probability = getattr(module, "layerdrop", 0)
        if module.training and probability > 0 and self.patch.merges:
            raise ToMeError(
                f"{type(module).__name__} skips blocks at random while it trains (layerdrop="
                f"{probability:g}), also the last one, which unmerges; set its layerdrop to 0, or "
                "write r=0"
            )
        self.patch.context.start()


class NetworkPostHook(Hook):
    """End of a forward, also after an exception: release its tensors."""

    after = always = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.patch.context.stop()


class BlockHook(Hook):
    """A hook that needs the number of its block."""

    def __init__(self, patch: ViTPatch, index: int) -> None:
        super().__init__(patch)
        self.index = index


class BlockPreHook(BlockHook):
    """Start of a block."""

    def __init__(self, patch: ViTPatch, index: int, inner: dict[str, Hook]) -> None:
        super().__init__(patch, index)
        self.inner = inner  # path in the block -> hook that changes a module's input

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        patch, context = self.patch, self.patch.context
        x = _tokens(args, kwargs)
        _enter(patch, self.index, x)
        if context.size is not None and tuple(context.size.shape) != tuple(x.shape[:2]):
            raise ToMeError(
                f"{patch.blocks[self.index]} was given {tuple(x.shape[:2])} (batch, tokens) but "
                f"the block before it left {tuple(context.size.shape)}: what comes between blocks "
                "must not change the number of tokens"
            )
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            patch.remember(x)
        for path, hook in self.inner.items():
            # A user's pre-hook there sees what it would see without merging, whoever came first.
            patches.keep_last(module.get_submodule(path), hook)


class FirstPreHook(BlockHook):
    """On a block's first norm, whose input is the block's: gradient checkpointing may run a block's
    forward again without the block's own hooks."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if _recomputes():
            _enter(self.patch, self.index, args[0])


def _enter(patch: ViTPatch, index: int, x: Tensor) -> None:
    """Prepare this thread's state for a block with input ``x``."""
    context = patch.context
    context.metric = context.plan = None
    if _recomputes():
        if patch.recall(x):
            return
        if index > 0 and not context.removed and patch.merges:
            raise ToMeError(
                f"{patch.blocks[index]} runs again in the backward, on another tensor than before: "
                "checkpoint with use_reentrant=False, or write r=0"
            )
    if index == 0 or not context.removed:
        # A forward may begin here: timm's forward_features is not the call of a module.
        context.begin(patch.removed_for(x.shape[1]))


class AttentionPreHook(BlockHook):
    """Proportional attention: softmax(Q K^T / sqrt(d) + log s), s the sizes of the key tokens.

    A token of size s receives the attention of s tokens. The bias is an additive mask, so that the
    model's own attention, fused or not, keeps doing the work; see :class:`WeighKeys`.
    """

    def __init__(self, patch: ViTPatch, index: int, mask: str | type[Injection]) -> None:
        super().__init__(patch, index)
        self.mask = mask  # see Family

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        merging = any(self.patch.context.removed)
        config = getattr(module, "config", None)
        if isinstance(config, ConfigProxy):
            config = config.own
        implementation = getattr(config, "_attn_implementation", None)
        takes_bias = implementation in (None, "eager", "sdpa")
        if merging and self.patch.config.prop_attn and not takes_bias:
            raise ToMeError(
                f"proportional attention needs an additive mask, which attn_implementation="
                f"{implementation!r} does not take; load the model with 'sdpa' or 'eager', or "
                "write prop_attn=False"
            )
        if not isinstance(self.mask, str):
            return None
        given = args[1] if len(args) > 1 else kwargs.get(self.mask)
        if merging and (given is not None or kwargs.get("is_causal")):
            what = "an attention mask" if given is not None else "is_causal=True"
            raise ToMeError(
                f"{self.patch.blocks[self.index]} was given {what}, which does not fit merged "
                "tokens: run the model without one, or write r=0"
            )
        bias = self.bias(_tokens(args, kwargs))
        if bias is None:
            return None
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, {**kwargs, self.mask: bias}

    def bias(self, x: Tensor) -> Tensor | None:
        """(B, 1, 1, N) in the dtype of ``x``, or None where all sizes are 1."""
        size = self.patch.context.size
        if size is None or not self.patch.config.prop_attn:
            return None
        log_size, keys = log_sizes(size, x.dtype), self.patch.context.keys
        keys.log_size, keys.masked = log_size, True
        return log_size.to(x.dtype)[:, None, None, :]


class WeighKeys(patches.Interceptor):
    """Around an attention: where its bias would cost a GPU the fast kernel, keys are weighed
    without it, see :class:`~..merging.keys.AttentionKeys`."""

    skips = True

    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        # Its hooks run inside, and say what the keys weigh.
        self.patch.context.keys = AttentionKeys()
        with self.patch.context.keys:
            return proceed(module, *args, **kwargs)


class MetricPostHook(Hook):
    """Keep an output for the matching."""

    after = True

    def __init__(self, patch: ViTPatch, head_dim: int = 0, third: int | None = None) -> None:
        super().__init__(patch)
        self.head_dim = head_dim  # average over heads of this many channels; 0: over none
        self.third = third  # of the channels to keep; None: all

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        context = self.patch.context
        if not any(context.removed):
            return
        y = (output if isinstance(output, Tensor) else output[0]).detach()
        if y.dim() == 4:
            y = y.mean(1)
        elif self.head_dim:
            y = y if self.third is None else y.chunk(3, dim=-1)[self.third]
            y = y.unflatten(-1, (-1, self.head_dim)).mean(2)
        context.metric = y


class MergePreHook(BlockHook):
    """Match, and merge the input of the feed-forward."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        patch, context = self.patch, self.patch.context
        config = patch.config
        metric, context.metric = context.metric, None
        r = context.removed[self.index]
        if r == 0:
            return None
        x = args[0]
        context.plan = plan = match_tokens(
            x.detach() if config.metric == "features" else metric,
            r,
            patch.prefix,
            config.distance,
            config.partition,
            config.seed,
            self.index,
        )
        if plan is None:
            return None
        return (combine(plan, x, context.size, config.combination), *args[1:]), kwargs


class UnmergePostHook(Hook):
    """Unmerge the output of the feed-forward."""

    after = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor):
        plan = self.patch.context.plan
        return None if plan is None else plan.unmerge(output)


class BlockPostHook(BlockHook):
    """Merge the output of the block and update the sizes."""

    after = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor):
        patch, context = self.patch, self.patch.context
        plan, context.plan = context.plan, None
        before = after = output.shape[1]
        if plan is not None:
            output = combine(plan, output, context.size, patch.config.combination)
            after = output.shape[1]
            if patch.config.trace_source or patch.unmerges:
                source, slot = context.source, plan.slot
                context.source = slot if source is None else slot.gather(1, source)
            context.size = total_size(plan, context.size)
        context.tokens = [*context.tokens, (before, after)]
        if self.index == len(patch.blocks) - 1:
            if not context.disabled and not _recomputes():
                patch.tokens, patch.size = context.tokens, context.size
                patch.source = context.source
            if patch.unmerges and context.source is not None:
                return gather_tokens(output, context.source)
        return None if plan is None else output


def _recomputes() -> bool:
    """Whether this is a forward inside of a backward, as gradient checkpointing runs it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
