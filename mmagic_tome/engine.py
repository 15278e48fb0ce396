# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where models, configs and merging meet: wrap the sites that a host names.

Nothing of a model is re-written. PyTorch's own module hooks do the work:

==============  =================================================================
network         pre-hook: start a forward, note the timestep; hook: end it
stack           pre-hook: note the token grid
block           pre-hook: make a plan from the tokens that come in
site            pre-hook: merge what goes in; hook: unmerge what comes out
==============  =================================================================

The hooks are small objects of top-level classes that share one
:class:`MergeState` per network, so that a model with them can still be
deep-copied (the copy is independent), pickled, and compiled as one graph.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .config import ToMeConfig
from .errors import ToMeError
from .hosts import Block, Host, find_host
from .merging import (
    GridLayout,
    MergePlan,
    bipartite_match,
    random_layout,
    regular_layout,
    tokens_to_remove,
)
from .merging.random import step_key


def apply_tome(
    model: object, config: ToMeConfig | Mapping[str, Any] | None = None, **options: Any
) -> ToMeHandle:
    """Merge tokens in ``model`` from now on, in place.

    Args:
        model: a diffusers UNet or pipeline, a MMagic model (or its ``unet``),
            MMagic's native ``DenoisingUnet``.
        config: a :class:`ToMeConfig`, a dict of its options, or None for the
            defaults (ratio 0.5 around self-attention of the finest level).
        **options: options of :class:`ToMeConfig`; they win over ``config``.

    Returns:
        ToMeHandle: to look at, change and remove what was applied; as a context
        manager it removes on exit. Applying to a model that already has token
        merging replaces it.

    Raises:
        ToMeError: an invalid option, a model of no known family, or a
            combination that would merge nothing; nothing is changed then.

    Example:
        >>> handle = apply_tome(pipeline, ratio=0.5)
        >>> image = pipeline("a red apple").images[0]
        >>> print(handle.summary())
    """
    config = ToMeConfig.coerce(config, **options)
    host, network = find_host(model)
    blocks = _blocks_to_merge(host, network, config)
    _let_the_compiler_see_hooks()
    remove_tome(network)

    state = MergeState(config, host)
    state.hook(network, _NetworkPreHook(state), _NetworkPostHook(state))
    stacks = set()
    for block in blocks:
        if block.stack not in stacks:
            stacks.add(block.stack)
            state.hook(block.stack, _StackPreHook(state))
        row = sum(other.downsample == block.downsample for other in state.blocks)
        merged = BlockState(block.name, block.downsample, row)
        state.blocks.append(merged)
        state.hook(block.module, _BlockPreHook(state, merged))
        for kind in config.kinds:
            if kind in block.sites:
                site = SiteState(f"{block.name}.{kind}", kind, merged)
                state.sites.append(site)
                before, after = _SitePreHook(state, site), _SitePostHook(state)
                state.hook(block.sites[kind], before, after)
    return ToMeHandle(network, state)


def remove_tome(model: object) -> bool:
    """Undo :func:`apply_tome`; the model is bit for bit what it was.

    Args:
        model: whatever :func:`apply_tome` takes.

    Returns:
        bool: whether there was anything to remove.
    """
    handle = get_handle(model)
    if handle is None:
        return False
    handle.remove()
    return True


def get_handle(model: object) -> ToMeHandle | None:
    """Handle of the token merging that is applied to ``model``; None if there is none.

    Works on copies and on unpickled models too: the state travels with the hooks.

    Args:
        model: whatever :func:`apply_tome` takes.
    """
    try:
        _, network = find_host(model)
    except ToMeError:
        return None
    for hook in network._forward_pre_hooks.values():
        if isinstance(hook, _NetworkPreHook):
            return ToMeHandle(network, hook.state)
    return None


class ToMeHandle:
    """What :func:`apply_tome` returns: a view on the token merging of one network."""

    def __init__(self, network: nn.Module, state: MergeState) -> None:
        self.network = network
        self._state = state

    @property
    def config(self) -> ToMeConfig:
        """The options in force."""
        return self._state.config

    @property
    def ratio(self) -> float:
        """Share of tokens removed per site. Assign to change it between runs; 0 is dense.

        Raises:
            ToMeError: on assignment of a ratio outside [0, config.ceiling], or when this
                merging was removed or replaced.
        """
        return self._state.config.ratio

    @ratio.setter
    def ratio(self, value: float) -> None:
        if not self.active:
            raise ToMeError(
                "this token merging was removed or replaced, its ratio changes nothing; use the "
                "handle of the last apply_tome, or get_handle(model)"
            )
        self._state.config = self._state.config.replace(ratio=value)

    @property
    def active(self) -> bool:
        """False once this merging was removed or replaced by another."""
        return bool(self._state.hooks)

    def remove(self) -> None:
        """Take token merging out of the network again; a second call does nothing."""
        self._state.remove()

    def reset(self) -> None:
        """Set the counters of :meth:`stats` back to zero."""
        for site in self._state.sites:
            site.tokens, site.kept, site.calls = None, None, 0
        for block in self._state.blocks:
            block.plans = 0

    def stats(self) -> list[dict[str, Any]]:
        """What was done where, one dict per site in running order.

        Keys: ``site`` (dotted path and kind), ``block`` (dotted path), ``kind``
        ('attn' | 'crossattn' | 'mlp'), ``downsample``, ``tokens`` and ``kept``
        (counts at the last call; None before it), ``calls`` (of the site) and
        ``plans`` (matchings made for the block) since :meth:`reset`. Compiled
        forwards record token counts but are not counted in calls and plans.
        """
        return [
            {
                "site": site.name,
                "block": site.block.name,
                "kind": site.kind,
                "downsample": site.block.downsample,
                "tokens": site.tokens,
                "kept": site.kept,
                "calls": site.calls,
                "plans": site.block.plans,
            }
            for site in self._state.sites
        ]

    def summary(self) -> str:
        """A table of :meth:`stats` to print, with the options in its title."""
        config = self.config
        title = (
            f"token merging in {type(self.network).__name__}: ratio {config.ratio:g}, "
            f"cells {config.sx}x{config.sy}, "
            f"{'random' if config.use_rand else 'regular'} destinations"
        )
        if not self.active:
            return f"{title} (removed)"
        header = ("site", "downsample", "tokens", "kept", "removed", "calls", "plans")
        rows = []
        for row in self.stats():
            tokens, kept = row["tokens"], row["kept"]
            ran = tokens is not None
            rows.append(
                (
                    row["site"],
                    str(row["downsample"]),
                    str(tokens) if ran else "-",
                    str(kept) if ran else "-",
                    f"{1 - kept / tokens:.0%}" if ran else "-",
                    str(row["calls"]),
                    str(row["plans"]),
                )
            )
        if all(row["tokens"] is None for row in self.stats()):
            title += " (not run yet)"
        return "\n".join([title, *_table(header, rows)])

    def __enter__(self) -> ToMeHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        where = f"{type(self.network).__name__}, {len(self._state.sites)} sites"
        return f"ToMeHandle({where}, ratio={self.ratio:g}{'' if self.active else ', removed'})"


# --- state ---------------------------------------------------------------------------------------


class MergeState:
    """Everything the hooks of one network share."""

    def __init__(self, config: ToMeConfig, host: Host) -> None:
        self.config = config
        self.host = host
        self.blocks: list[BlockState] = []
        self.sites: list[SiteState] = []
        self.hooks: list[RemovableHandle] = []
        self._threads = threading.local()
        self._compiled = Forward()

    @property
    def forward(self) -> Forward:
        """What belongs to the forward that is under way in this thread.

        A network may run in several threads at once (a server, ``DataParallel``).
        Compiled code knows no threads: all of it shares one, so a network with compiled parts
        must not be run in two threads at once.
        """
        if torch.compiler.is_compiling():
            return self._compiled
        forward = getattr(self._threads, "forward", None)
        if forward is None:
            forward = self._threads.forward = Forward()
        return forward

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """The same, for hooks of outer modules: the modules inside may be compiled on their own
        (``compile_repeated_blocks``) and look for it elsewhere."""
        if torch.compiler.is_compiling():
            return (self._compiled,)
        return self.forward, self._compiled

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_threads"], state["_compiled"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._threads = threading.local()
        self._compiled = Forward()

    def hook(self, module: nn.Module, before: Any, after: Any = None) -> None:
        """Register a pre-hook and optionally a post-hook, to be removed together."""
        self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self.hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def layout(
        self, height: int, width: int, block: BlockState, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(destinations, sources) for a block; all layouts of a grid are drawn together."""
        config, forward = self.config, self.forward
        key = (block.downsample, height, width, device)
        layouts = forward.layouts.get(key)
        if layouts is None:
            if config.use_rand:
                # A layout per block of the level: every block decorrelates its choice
                # from the others' at no more launches than one layout takes.
                count = sum(other.downsample == block.downsample for other in self.blocks)
                layouts = random_layout(
                    height,
                    width,
                    config.sx,
                    config.sy,
                    seed=config.seed,
                    step=forward.step,
                    count=count,
                    device=device,
                )
            else:
                layouts = regular_layout(height, width, config.sx, config.sy, device)
            forward.layouts[key] = layouts
        return layouts.select(block.row if config.use_rand else 0)


class Forward:
    """What the hooks know during one forward and drop at its end.

    Attributes:
        running (bool): whether the network's own forward is under way.
        step (Tensor | None): key of the random destinations, from the timestep.
        grid (tuple | None): (height, width) in tokens, of the stack that runs.
        layouts (dict): (downsample, height, width, device) -> :class:`GridLayout`.
        plan (MergePlan | None): of the block that runs. One place for all blocks, since they
            do not nest: so the hooks of all blocks are the same code to a compiler.
    """

    def __init__(self) -> None:
        self.running = False
        self.step: Tensor | None = None
        self.grid: tuple[int, int] | None = None
        self.layouts: dict[tuple, GridLayout] = {}
        self.plan: MergePlan | None = None

    def clear(self, running: bool) -> None:
        """Forget everything, at the start (``running``) or the end of a forward."""
        self.running = running
        self.step = None
        self.grid = None
        self.layouts = {}
        self.plan = None


class BlockState:
    """A block, its place among the blocks of its level, and the plans a backward may need."""

    def __init__(self, name: str, downsample: int, row: int) -> None:
        self.name = name
        self.downsample = downsample
        self.row = row
        self.plans = 0
        # Input tensor -> (config, plan), for as long as the tensor lives: gradient
        # checkpointing calls the block again during the backward with the same tensor, when
        # its network has long gone on, perhaps to another step and size.
        self.saved = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["saved"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.saved = WeakTensorKeyDictionary()


class SiteState:
    """A wrapped module and what was seen there."""

    def __init__(self, name: str, kind: str, block: BlockState) -> None:
        self.name = name
        self.kind = kind
        self.block = block
        self.tokens: int | None = None
        self.kept: int | None = None
        self.calls = 0


# --- hooks ---------------------------------------------------------------------------------------


class _NetworkPreHook:
    """Start of a forward: forget the last one, derive the key of the random destinations."""

    def __init__(self, state: MergeState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.state
        for forward in state.forwards:
            forward.clear(running=True)
        if not (state.config.use_rand and state.config.ratio > 0):
            return
        timestep = state.host.timestep(args, kwargs)
        if timestep is None:
            return
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(float(timestep))
        # One layout serves the whole batch, so its first timestep speaks for all.
        step = step_key(timestep.detach().reshape(-1)[0])
        for forward in state.forwards:
            forward.step = step


class _NetworkPostHook:
    """End of a forward: drop what belonged to it (a compiled graph would return it)."""

    def __init__(self, state: MergeState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        for forward in self.state.forwards:
            forward.clear(running=False)


class _StackPreHook:
    """Note the token grid."""

    def __init__(self, state: MergeState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        grid = self.state.host.grid(args, kwargs)
        for forward in self.state.forwards:
            forward.grid = grid


class _BlockPreHook:
    """Make the plan that all sites of the block share, from the tokens that enter it."""

    def __init__(self, state: MergeState, block: BlockState) -> None:
        self.state = state
        self.block = block

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state, block = self.state, self.block
        config, forward = state.config, state.forward
        forward.plan = None
        if config.ratio <= 0:
            return
        metric = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            made_for, plan = block.saved.get(metric, (None, None))
            if made_for is not config:
                plan = self.plan(metric)
                block.saved[metric] = (config, plan)
        else:
            plan = self.plan(metric)
        forward.plan = plan

    def plan(self, metric: Tensor) -> MergePlan | None:
        """A plan for (B, N, C) tokens of this block; None if there is nothing to merge."""
        state, block, config = self.state, self.block, self.state.config
        forward = state.forward
        if not forward.running or forward.grid is None:
            raise ToMeError(
                f"{block.name} was called outside a forward of its network, so the token grid is "
                "not known. Call the network; for gradient checkpointing, write "
                "use_reentrant=False (diffusers' default)"
            )
        height, width = forward.grid
        tokens = metric.shape[1]
        if tokens != height * width:
            raise ToMeError(
                f"{block.name} was given {tokens} tokens for a grid of {height}x{width}; "
                "token merging needs one token per grid place"
            )
        cells = (height // config.sy) * (width // config.sx)
        r = tokens_to_remove(tokens, tokens - cells, config.ratio) if cells else 0
        if r <= 0:
            return None
        if not torch.compiler.is_compiling():
            block.plans += 1
        destinations, sources = state.layout(height, width, block, metric.device)
        return bipartite_match(
            metric.detach(), destinations, sources, r, exact=config.exact_matching
        )


class _SitePreHook:
    """Merge the tokens that go into a site."""

    def __init__(self, state: MergeState, site: SiteState) -> None:
        self.state = state
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        site = self.site
        plan = self.state.forward.plan
        x = args[0] if args else kwargs["hidden_states"]
        site.tokens = x.shape[1]
        site.kept = x.shape[1] if plan is None else plan.num_slots
        if not torch.compiler.is_compiling():
            site.calls += 1
        if plan is None:
            return None
        _check_site(site, plan, x, kwargs)
        if args:
            return (plan.merge(x), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": plan.merge(x)}


class _SitePostHook:
    """Unmerge the tokens that come out of a site."""

    def __init__(self, state: MergeState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        plan = self.state.forward.plan
        if plan is None:
            return None
        if isinstance(output, tuple):
            return (plan.unmerge(output[0]), *output[1:])
        return plan.unmerge(output)


def _let_the_compiler_see_hooks() -> None:
    """Make compiled graphs depend on the hooks of the modules they were made from.

    By default dynamo takes for granted that hooks never change and that two models of one
    class have the same ones: a graph that was compiled for a dense model would silently go on
    serving it after ``apply_tome``, and would serve a merged copy of it as well.
    """
    import torch._dynamo.config as dynamo

    if getattr(dynamo, "skip_nnmodule_hook_guards", False):
        dynamo.skip_nnmodule_hook_guards = False
        # What was compiled before lacks the guards.
        torch.compiler.reset()


def _check_site(site: SiteState, plan: MergePlan, x: Tensor, kwargs: dict[str, Any]) -> None:
    """Uses of a block that cannot be merged, said in the user's words."""
    if x.shape[1] != plan.num_tokens or x.shape[0] != plan.batch:
        raise ToMeError(
            f"{site.name} was given {tuple(x.shape[:2])} (batch, tokens) but its block has "
            f"({plan.batch}, {plan.num_tokens}): feed-forward chunking and merge_mlp exclude each "
            "other; call disable_forward_chunking() or write merge_mlp=False"
        )
    if site.kind == "attn" and kwargs.get("attention_mask") is not None:
        context = kwargs.get("encoder_hidden_states")
        if context is None or context.shape[1] == plan.num_tokens:
            raise ToMeError(
                f"{site.name} was given an attention_mask over image tokens, which has no meaning "
                "for merged tokens; call the model without it or write merge_attn=False"
            )
    if site.kind == "crossattn" and kwargs.get("ip_adapter_masks") is not None:
        raise ToMeError(
            f"{site.name} was given ip_adapter_masks, which are laid over the token grid and do "
            "not fit merged tokens; write merge_crossattn=False"
        )


# --- choice of blocks and presentation -----------------------------------------------------------


def _blocks_to_merge(host: Host, network: nn.Module, config: ToMeConfig) -> list[Block]:
    """Blocks within ``max_downsample`` that have a wanted site, or an error naming the levels."""
    name = type(network).__name__
    blocks = [b for b in host.blocks(network) if any(kind in b.sites for kind in config.kinds)]
    if not blocks:
        raise ToMeError(
            f"{name} has no transformer block with a site of kind {' or '.join(config.kinds)}: "
            "nothing to merge"
        )
    counts: dict[int, int] = {}
    for block in blocks:
        counts[block.downsample] = counts.get(block.downsample, 0) + 1
    finest = min(counts)
    limit = finest if config.max_downsample == "auto" else config.max_downsample
    chosen = [block for block in blocks if block.downsample <= limit]
    if not chosen:
        levels = ", ".join(
            f"{level} ({count} block{'s' if count > 1 else ''})"
            for level, count in sorted(counts.items())
        )
        raise ToMeError(
            f"max_downsample={limit} leaves nothing to merge in this {name}: it has transformer "
            f"blocks at downsample {levels}. Write max_downsample={finest} or 'auto'"
        )
    return chosen


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table: first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: tuple[str, ...]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        return "  ".join(padded).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
