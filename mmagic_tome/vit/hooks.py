# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The hooks: what happens around and inside a block of a merged vision transformer.

Merging sits between attention and feed-forward, but a block adds what the feed-forward gives to
the tokens that went into it, in the middle of its own code, where no hook reaches. So the
tokens are merged in front of the feed-forward, its output is copied back to all of them, and
what leaves the block is merged once more by the same plan. With M for merging, U for copying back
and f for norm and feed-forward::

    M(x + U f(M x)) = M x + f(M x)

exactly, since M is linear (or a maximum, or a choice) in every slot and U f is the same for all
tokens of one. The price is one more addition and merge of (B, N, C), small beside the products.
Dropout behind the feed-forward draws for every token, so where it is on, that of a slot is the
average of several draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ToMeError
from ..merging.sequence import match_tokens
from .families import Heads
from .interface import StandInConfig
from .schedules import removed_for_speedup
from .state import Saved, ViTState


class RootPreHook:
    """Start of a forward."""

    def __init__(self, state: ViTState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.state
        merges = state.removed is None or any(state.removed)
        share = getattr(module, "layerdrop", 0)
        if merges and module.training and share > 0:
            raise ToMeError(
                f"{type(module).__name__} leaves out blocks at random while it trains (layerdrop="
                f"{share:g}), also the last, which copies merged tokens back; set its layerdrop to "
                "0, or write r=0"
            )
        state.forward.begin([])


class BlockPreHook:
    """Know the sizes of the tokens that come in."""

    def __init__(self, state: ViTState, index: int) -> None:
        self.state = state
        self.index = index
        self.saved = Saved()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state, forward = self.state, self.state.forward
        x = _tokens(args, kwargs)
        tokens = x.shape[1]
        if self.index == 0 or not forward.removed:
            # The first block begins a forward too: timm's forward_features is no call of a module.
            forward.begin(_removed(state, tokens))
        if _may_run_again() and not self.restore(x):
            known = (state.options, forward.removed, forward.size, forward.source)
            self.saved.keep(x, known)
        forward.metric = forward.match = None
        if forward.size is not None and tuple(forward.size.shape) != tuple(x.shape[:2]):
            raise ToMeError(
                f"{state.blocks[self.index]} was given {tuple(x.shape[:2])} (batch, tokens) but "
                f"the block before it left {tuple(forward.size.shape)}: what comes between blocks "
                "must not change the number of tokens"
            )

    def restore(self, x: Tensor) -> bool:
        """Know again what was known when ``x`` came in; whether anything was."""
        known = self.saved.get(x)
        if known is None or known[0] is not self.state.options:
            return False
        forward = self.state.forward
        _, forward.removed, forward.size, forward.source = known
        forward.tokens = forward.tokens[: self.index]
        return True


class FirstPreHook:
    """Where gradient checkpointing runs a block's forward again, past the block's own hooks: know
    the sizes again. The first norm is given the same tensor as the block."""

    def __init__(self, block: BlockPreHook) -> None:
        self.block = block

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if _may_run_again():
            self.block.restore(args[0])


class AttentionPreHook:
    """Proportional attention: add log(size) to the attention of every token.

    softmax(Q K^T / sqrt(d) + log s): a token that stands for s patches is attended to
    like s tokens. Given as an additive mask, so that the model's own attention, fused or
    not, goes on doing the work.
    """

    def __init__(self, state: ViTState, index: int, mask: str | None) -> None:
        self.state = state
        self.index = index
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        merging = any(self.state.forward.removed)
        config = getattr(module, "config", None)
        if isinstance(config, StandInConfig):
            config = config.config
        implementation = getattr(config, "_attn_implementation", None)
        takes_bias = implementation in (None, "eager", "sdpa")
        if merging and self.state.options.prop_attn and not takes_bias:
            raise ToMeError(
                f"proportional attention needs an additive mask, which attn_implementation="
                f"{implementation!r} does not take; load the model with 'sdpa' or 'eager', or "
                "write prop_attn=False"
            )
        if self.mask is None:
            return None
        given = args[1] if len(args) > 1 else kwargs.get(self.mask)
        if merging and (given is not None or kwargs.get("is_causal")):
            what = "an attention mask" if given is not None else "is_causal=True"
            raise ToMeError(
                f"{self.state.blocks[self.index]} was given {what}, which does not fit merged "
                "tokens: run the model without one, or write r=0"
            )
        bias = self.bias(_tokens(args, kwargs))
        if bias is None:
            return None
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, {**kwargs, self.mask: bias}

    def bias(self, x: Tensor) -> Tensor | None:
        """(B, 1, 1, N) in the dtype of ``x``, or None where all tokens count alike."""
        size = self.state.forward.size
        if size is None or not self.state.options.prop_attn:
            return None
        return size.log().to(x.dtype)[:, None, None, :]


class MetricHook:
    """Keep queries, keys or values for the matching: their mean over the heads."""

    def __init__(self, state: ViTState, heads: Heads) -> None:
        self.state = state
        self.heads = heads

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        forward, heads = self.state.forward, self.heads
        if not any(forward.removed):
            return
        y = output.detach()
        if heads.dim == 0:
            forward.metric = y.mean(1)
            return
        y = y.chunk(heads.parts, dim=-1)[heads.part]
        forward.metric = y.unflatten(-1, (-1, heads.dim)).mean(2)


class OutputHook:
    """Keep the output of the attention for the matching."""

    def __init__(self, state: ViTState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        self.state.forward.metric = output.detach()


class NormPreHook:
    """Match, and merge what goes into the feed-forward."""

    def __init__(self, state: ViTState, index: int) -> None:
        self.state = state
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        state, forward = self.state, self.state.forward
        options = state.options
        metric, forward.metric = forward.metric, None
        r = forward.removed[self.index]
        if r == 0:
            return None
        x = args[0]
        match = match_tokens(
            x.detach() if options.metric == "features" else metric,
            r,
            state.prefix,
            options.distance,
            options.partition,
            options.seed,
            self.index,
        )
        forward.match = match
        if match is None:
            return None
        return (match.combine(x, forward.size, options.combination), *args[1:]), kwargs


class LastPostHook:
    """Copy the output of the feed-forward back to all tokens."""

    def __init__(self, state: ViTState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor):
        match = self.state.forward.match
        return None if match is None else match.plan.unmerge(output)


class BlockPostHook:
    """Merge what leaves the block, and note who holds what."""

    def __init__(self, state: ViTState, index: int) -> None:
        self.state = state
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor):
        state, forward = self.state, self.state.forward
        match, forward.match = forward.match, None
        before = after = output.shape[1]
        if match is not None:
            output = match.combine(output, forward.size, state.options.combination)
            after = output.shape[1]
            if state.traces:
                slot = match.plan.slot
                source = forward.source
                forward.source = slot if source is None else slot.gather(1, source)
            forward.size = match.total(forward.size)
        forward.tokens = [*forward.tokens, (before, after)]
        if self.index == len(state.blocks) - 1:
            state.tokens, state.size, state.source = forward.tokens, forward.size, forward.source
            if state.unmerges and forward.source is not None:
                index = forward.source[..., None].expand(-1, -1, output.shape[-1])
                return output.gather(1, index)
        return None if match is None else output


def _may_run_again() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _removed(state: ViTState, tokens: int) -> list[int]:
    if state.removed is not None:
        return state.removed
    blocks = len(state.blocks)
    r = removed_for_speedup(
        state.options.target_speedup, blocks, tokens, state.prefix, state.width, state.hidden
    )
    return [r] * blocks


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
