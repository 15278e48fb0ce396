# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where models, configs and merging meet: wrap the sites that a host names.

Nothing of a model is re-written. PyTorch's own module hooks do the work:

==============  =================================================================
network         pre-hook: start a forward, note the timestep; hook: end it
stack           pre-hook: note the token grid
block           pre-hook: make a plan from the tokens that come in
site            pre-hook: merge what goes in; hook: unmerge what comes out
==============  =================================================================

The hooks (:mod:`.hooks`) are small objects of top-level classes that share one
:class:`~.state.MergeState` per network, so that a model with them can still be
deep-copied (the copy is independent), pickled, and compiled as one graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import ToMeConfig
from .errors import ToMeError
from .graphs import prepare_compiler
from .hooks import (
    AlikePreHook,
    BlockPreHook,
    CarriedPostHook,
    CarriedPreHook,
    NetworkPostHook,
    NetworkPreHook,
    SitePostHook,
    SitePreHook,
    StackPreHook,
)
from .models import Block, Host, find_host
from .reuse import scope_states
from .samplers import warn_of_paying_back
from .schedules import Place
from .state import BlockState, MergeState, SiteState

if TYPE_CHECKING:
    from .vit import ViTHandle


def apply_tome(
    model: object, config: ToMeConfig | Mapping[str, Any] | None = None, **options: Any
) -> ToMeHandle | ViTHandle:
    """Merge tokens in ``model`` from now on, in place.

    Args:
        model: a diffusers UNet, diffusion transformer or pipeline, a MMagic model (or its
            ``unet``), MMagic's native ``DenoisingUnet``.
        config: a :class:`ToMeConfig`, a dict of its options, or None for the
            defaults (ratio 0.5 around self-attention of the finest level).
        **options: options of :class:`ToMeConfig`; they win over ``config``. With ``r`` or
            ``target_speedup`` among them, ``model`` is a vision transformer and all options are
            those of :func:`mmagic_tome.vit.apply_tome_vit`.

    Returns:
        ToMeHandle: to look at, change and remove what was applied; as a context
        manager it removes on exit. Applying to a model that already has token
        merging replaces it; as a context manager it is put back on exit. For a vision
        transformer a :class:`mmagic_tome.vit.ViTHandle`.

    Raises:
        ToMeError: an invalid option, a model of no known family, or a
            combination that would merge nothing; nothing is changed then.

    Example:
        >>> handle = apply_tome(pipeline, ratio=0.5)
        >>> image = pipeline("a red apple").images[0]
        >>> print(handle.summary())
    """
    named = {**config, **options} if isinstance(config, Mapping) else options
    if "r" in named or "target_speedup" in named:
        from .vit import apply_options

        return apply_options(model, named)
    config = ToMeConfig.coerce(config, **options)
    found = [(config, *_found(model, config))]
    if config.controlnet_config is not None:
        # Looked at before anything is changed, like the network itself.
        for branch in _controlnets(model):
            own = config.controlnet_config
            found.append((own, *_found(branch, own)))
    warn_of_paying_back(model, config.reuse_plan)
    prepare_compiler()
    replaced = [_removed(network) for _, _, network, _ in found]
    state, *branches = [_hooked(*one) for one in found]
    state.branches = branches
    return ToMeHandle(found[0][2], state, [old for old in replaced if old is not None])


def _found(model: object, config: ToMeConfig) -> tuple[Host, nn.Module, list[Block]]:
    """Host, network and the blocks to merge; nothing is changed yet."""
    host, network = find_host(model)
    blocks = _blocks_to_merge(host, network, config)
    for block in blocks:
        _check_block(block, config)
    _check_ratio(blocks, config)
    if config.reuse_plan is not None:
        scope_states(config.reuse_plan, host, network)
    if config.across_frames and not host.has_frames:
        raise ToMeError(
            f"across_frames=True: {type(network).__name__} does not work frame by frame; leave it "
            "out (Wan and CogVideoX merge across frames as they are)"
        )
    return host, network, blocks


def _controlnets(model: object) -> list[nn.Module]:
    """The ControlNets beside the network of a pipeline or a MMagic model."""
    branch = getattr(model, "controlnet", None)
    if branch is None:
        raise ToMeError(
            f"controlnet=True asks for a ControlNet, and a {type(model).__name__} has none; leave "
            "it out, or pass a model or pipeline that has it as .controlnet"
        )
    return list(getattr(branch, "nets", None) or [branch])


def _removed(network: nn.Module) -> MergeState | None:
    """Take out what is applied to a network; what that was, to be put back."""
    handle = get_handle(network)
    if handle is None:
        return None
    handle.remove()
    return handle._state


def _hooked(config: ToMeConfig, host: Host, network: nn.Module, blocks: list[Block]) -> MergeState:
    """Hooks on the network, its stacks, blocks and sites."""
    state = MergeState(config, host)
    state.hook(network, NetworkPreHook(state), NetworkPostHook(state))
    if config.reuse_plan is not None:
        state.leave_out(scope_states(config.reuse_plan, host, network))
    stacks = set()
    carried = config.residual_plan is not None
    for depth, block in enumerate(blocks):
        if block.stack not in stacks:
            stacks.add(block.stack)
            state.hook(block.stack, StackPreHook(state))
        row = sum(other.downsample == block.downsample for other in state.blocks)
        merged = BlockState(block.name, block.downsample, row, depth)
        merged.kinds = tuple(kind for kind in config.kinds if kind in block.sites)
        merged.text_beside = "block" in block.text_beside
        state.blocks.append(merged)
        state.hook(block.module, BlockPreHook(state, merged))
        for name, kind, modules in _sites_in_running_order(block, merged.kinds):
            site = SiteState(name, kind, merged, modules, block)
            if config.proportional and kind in ("attn", "attn_kv"):
                site.weights = block.mask_argument
            state.sites.append(site)
            if carried or kind in ("block", "stack"):
                before, after = CarriedPreHook(state, site), CarriedPostHook(state, site)
            else:
                before, after = SitePreHook(state, site), SitePostHook(state, site)
            state.hook(modules[0], before)
            for module in block.alike.get(kind, ()):
                state.hook(module, AlikePreHook(state, site))
            state.hook_after(modules[-1], after)
        state.sites[-1].last = True
    return state


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


def get_handle(model: object) -> ToMeHandle | ViTHandle | None:
    """Handle of the token merging that is applied to ``model``; None if there is none.

    Works on copies and on unpickled models too: the state travels with the hooks.

    Args:
        model: whatever :func:`apply_tome` takes.
    """
    try:
        _, network = find_host(model)
    except ToMeError:
        from .vit import get_vit_handle

        return get_vit_handle(model)
    for hook in network._forward_pre_hooks.values():
        if isinstance(hook, NetworkPreHook):
            return ToMeHandle(network, hook.state)
    return None


class ToMeHandle:
    """What :func:`apply_tome` returns: a view on the token merging of one network."""

    def __init__(
        self, network: nn.Module, state: MergeState, replaced: list[MergeState] | None = None
    ) -> None:
        self.network = network
        self._state = state
        self._replaced = replaced or []

    @property
    def config(self) -> ToMeConfig:
        """The options in force."""
        return self._state.config

    @property
    def ratio(self) -> Any:
        """Share of tokens removed per site, or its schedule. Assign to change it between runs, also
        in the ControlNet where that is merged along; 0 is dense.

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
        for state in self._states.values():
            state.config = state.config.replace(ratio=value)
            state.forget_run()

    @property
    def _states(self) -> dict[str, MergeState]:
        """What the names of its sites begin with -> state, of the network and its ControlNets."""
        branches = self._state.branches
        names = ["controlnet."]
        if len(branches) > 1:
            names = [f"controlnet.nets.{index}." for index in range(len(branches))]
        # One that was replaced on its own belongs here no more.
        named = {name: state for name, state in zip(names, branches) if state.hooks}
        return {"": self._state, **named}

    @property
    def description(self) -> str:
        """What is done, in a few words: ratio, method, what is carried from step to step."""
        return ", ".join(_in_words(self.config))

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The dense model, bit for bit, while entered; all hooks stay in place.

        Ratio 0 alone would leave on what is carried from step to step (``reuse``, ``residual``).
        Runs begin anew at both ends.
        """
        held = [(state, state.config) for state in self._states.values()]
        try:
            for state, config in held:
                state.config = config.replace(
                    ratio=0, method="tome", refresh=None, residual=None, reuse=None
                )
                state.forget_run()
            yield
        finally:
            for state, config in held:
                state.config = config
                state.forget_run()

    @property
    def active(self) -> bool:
        """False once this merging was removed or replaced by another."""
        return bool(self._state.hooks)

    def remove(self) -> None:
        """Take token merging out of the network again, and out of the ControlNet that was merged
        along; a second call does nothing."""
        self._state.remove()

    def reset(self) -> None:
        """Set the counters of :meth:`stats` back to zero, and begin a new denoising run.

        The second is only needed where a run was left in the middle and the next one starts at a
        lower timestep: runs are told apart by a timestep that does not fall.
        """
        for state in self._states.values():
            state.forget_run()
            for site in state.sites:
                site.tokens, site.kept, site.calls, site.dense_calls = None, None, 0, 0
            for block in state.blocks:
                block.plans = 0
            for scope in state.scopes:
                scope.runs = scope.reused = 0

    def stats(self) -> list[dict[str, Any]]:
        """What was done where, one dict per site in running order.

        Keys: ``site`` (dotted path and kind), ``block`` (dotted path), ``kind``
        (see :class:`ToMeConfig`), ``downsample``, ``tokens`` and ``kept``
        (counts at the last call; None before it; 0 kept: the output was carried over), ``calls``
        (of the site), ``dense_calls`` (those without merging) and
        ``plans`` (matchings made for the block) since :meth:`reset`. Compiled
        forwards record token counts but are not counted in calls and plans. Sites of a ControlNet
        that is merged along come last, and begin with ``controlnet.``.
        """
        return [
            {
                "site": prefix + site.name,
                "block": prefix + site.block.name,
                "kind": site.kind,
                "downsample": site.block.downsample,
                "tokens": site.tokens,
                "kept": site.kept,
                "calls": site.calls,
                "dense_calls": site.dense_calls,
                "plans": site.block.plans,
            }
            for prefix, state in self._states.items()
            for site in state.sites
        ]

    def scopes(self) -> list[dict[str, Any]]:
        """Parts of the network that do not run at every step (option ``reuse``), one dict each.

        Keys: ``scope`` ('network' or 'deep', in a ControlNet with ``controlnet.`` in front),
        ``runs`` and ``reused`` (calls at which it ran, and at which its output was foretold)
        since :meth:`reset`.
        """
        return [
            {"scope": prefix + scope.name, "runs": scope.runs, "reused": scope.reused}
            for prefix, state in self._states.items()
            for scope in state.scopes
        ]

    def summary(self) -> str:
        """A table of :meth:`stats` to print, with the options in its title."""
        config = self.config
        title = f"token merging in {type(self.network).__name__}: " + ", ".join(
            _in_words(config, details=True)
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
        scopes = [
            f"{row['scope']}: ran {row['runs']} times, output foretold {row['reused']} times"
            for row in self.scopes()
        ]
        return "\n".join([title, *_table(header, rows), *scopes])

    def __enter__(self) -> ToMeHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # One that was removed or replaced in the meantime has nothing to undo.
        if not self.active:
            return
        self.remove()
        for state in self._replaced:
            state.put_back()

    def __repr__(self) -> str:
        where = f"{type(self.network).__name__}, {len(self._state.sites)} sites"
        return f"ToMeHandle({where}, {self.description}{'' if self.active else ', removed'})"


# --- choice of blocks and presentation -----------------------------------------------------------


def _blocks_to_merge(host: Host, network: nn.Module, config: ToMeConfig) -> list[Block]:
    """Blocks within ``max_downsample`` that have a wanted site, or an error naming the levels."""
    name = type(network).__name__
    every = _with_all_sites(host.blocks(network), config.kinds)
    blocks = [block for block in every if any(kind in block.sites for kind in config.kinds)]
    if not blocks:
        known = dict.fromkeys(kind for block in every for kind in block.sites)
        there = (
            f"its blocks have {', '.join(known)}"
            if known
            else f"none of its modules is a block as in {host.description}. For blocks of your own "
            "write a host: docs/adding_a_model.md"
        )
        raise ToMeError(
            f"{name} has no transformer block with a site of kind {' or '.join(config.kinds)}, so "
            f"there is nothing to merge: {there}"
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


def _check_block(block: Block, config: ToMeConfig) -> None:
    """Refuse what a block's structure does not allow, in the words of its host."""
    residual = config.residual_plan
    for kind in config.kinds:
        if kind in block.refused:
            raise ToMeError(f"{block.name} cannot be merged at {kind!r}: {block.refused[kind]}")
        if config.proportional and kind in ("attn", "attn_kv") and block.mask_argument is None:
            raise ToMeError(
                f"proportional=True: self-attention of {block.name} takes no mask to weigh keys "
                "by; write proportional=False"
            )
        if kind in block.alike and residual is not None:
            raise ToMeError(
                f"{block.name} takes queries, keys and values from what is merged at {kind!r}, so "
                "that it cannot run dense at refreshes in between; write residual=None"
            )
        if kind in block.joint and residual is not None and residual.kind == "reuse":
            raise ToMeError(
                f"residual 'reuse' leaves out {block.name} at {kind!r}, which computes the text's "
                "tokens too; write residual='exact' or 'own', or sites=['mlp']"
            )


def _check_ratio(blocks: list[Block], config: ToMeConfig) -> None:
    """Refuse a schedule whose ratios are all for places that are not merged."""
    places = [
        Place(kind, block.downsample, depth, len(blocks))
        for depth, block in enumerate(blocks)
        for kind in config.kinds
        if kind in block.sites
    ]
    if not config.ratio_schedule.misses(places):
        return
    levels = ", ".join(map(str, sorted({place.downsample for place in places})))
    sites = ", ".join(dict.fromkeys(place.site for place in places))
    raise ToMeError(
        f"ratio={config.ratio!r} names no ratio for what is merged here: downsample {levels}, "
        f"sites {sites}. Name one of these, or choose others with max_downsample and sites"
    )


def _sites_in_running_order(
    block: Block, kinds: tuple[str, ...]
) -> Iterator[tuple[str, str, list[nn.Module]]]:
    """(name, kind, modules) of every site of a block, twins included."""
    for kind, modules in block.sites.items():
        if kind not in kinds:
            continue
        modules = list(modules) if isinstance(modules, (list, tuple)) else [modules]
        yield f"{block.name}.{kind}", kind, modules
        if kind in block.twins:
            yield f"{block.name}.{kind}_2", kind, [block.twins[kind]]


def _with_all_sites(blocks: list[Block], kinds: tuple[str, ...]) -> list[Block]:
    """The blocks with the sites that follow from what a host names.

    'attn_kv' is at the same module as 'attn', 'block' is the block itself; 'stack' is all blocks
    of a stack at once, named after the first, which then stands for them all.
    """
    if "stack" in kinds:
        stacks: dict[nn.Module, list[Block]] = {}
        for block in blocks:
            stacks.setdefault(block.stack, []).append(block)
        return [
            replace(members[0], sites={"stack": [block.module for block in members]})
            for members in stacks.values()
        ]
    return [replace(block, sites=_all_sites(block)) for block in blocks]


def _all_sites(block: Block) -> dict[str, Any]:
    sites: dict[str, Any] = {}
    for kind, modules in block.sites.items():
        sites[kind] = modules
        if kind == "attn":
            sites["attn_kv"] = modules
    return {**sites, "block": block.module}


def _in_words(config: ToMeConfig, details: bool = False) -> list[str]:
    """What is done, phrase by phrase."""
    words = []
    residual, reuse = config.residual_plan, config.reuse_plan
    if residual is not None and residual.kind == "reuse":
        words.append("outputs reused")
    elif not config.ratio_schedule.constant:
        words.append(f"ratio by schedule {config.ratio!r}")
    elif config.ratio or reuse is None:
        words.append(f"ratio {config.ratio:g}")
    if details and words:
        words.append(f"cells {config.sx}x{config.sy}")
        words.append(f"{'random' if config.use_rand else 'regular'} destinations")
    if config.method != "tome":
        words.append(f"method {config.method!r}")
    if config.proportional:
        words.append("proportional attention")
    if config.across_frames:
        words.append("across frames")
    refresh = config.refresh_plan
    if refresh.at is not None:
        words.append(f"refreshed at steps {', '.join(map(str, refresh.at))}")
    elif refresh.steps > 1:
        words.append(f"refreshed every {refresh.steps} steps")
    if residual is not None:
        words.append(f"residual {residual.kind} of order {residual.order}")
    if reuse is not None:
        words += [f"{name} every {scope.steps} steps" for name, scope in reuse.scopes.items()]
    return words


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table: first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: tuple[str, ...]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        return "  ".join(padded).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
