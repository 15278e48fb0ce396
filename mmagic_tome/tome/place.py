# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which blocks and targets of a network are merged, and the hooks on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import ToMeConfig
from ..errors import ToMeError
from ..models import Block, ModelAdapter
from ..patch import intercept, interceptors_of, register
from ..schedules import Place
from .block import BlockPreHook
from .network import GridPreHook, NetworkPostHook, NetworkPreHook, RunSignals
from .state import BlockState, Target, TomePatch
from .target import target_hooks


def place(
    config: ToMeConfig,
    adapter: ModelAdapter,
    network: nn.Module,
    blocks: list[Block],
    model: object,
) -> TomePatch:
    """Register hooks on a network, its grids, blocks and targets.

    Args:
        blocks: what :func:`blocks_to_merge` returned.
        model: what the user passed; its scheduler places timesteps on the schedule.
    """
    patch = TomePatch(config, adapter, model)
    paths = {id(module): path for path, module in network.named_modules(remove_duplicate=False)}
    register(network, NetworkPreHook(patch))
    register(network, NetworkPostHook(patch))
    levels = sorted({block.downsample for block in blocks})
    grids = set()
    for depth, block in enumerate(blocks):
        if block.grid_module not in grids:
            grids.add(block.grid_module)
            register(block.grid_module, GridPreHook(patch))
        kinds = tuple(kind for kind in config.kinds if kind in block.targets)
        joint = "block" in block.joint_sequence
        merged = BlockState(block.name, kinds, block.downsample, depth, len(blocks), joint)
        merged.level = levels.index(block.downsample)
        merged.row = sum(one.downsample == block.downsample for one in patch.blocks)
        merged.rows = sum(one.downsample == block.downsample for one in blocks)
        patch.blocks.append(merged)
        register(block.module, BlockPreHook(patch, merged))
        for name, kind, modules in _targets_in_running_order(block, kinds):
            target = Target(name, kind, merged, block)
            target.paths = tuple(paths[id(module)] for module in modules)
            target.shared = tuple(paths[id(one)] for one in block.shared_input.get(kind, ()))
            if config.prop_attn and kind in ("attn", "attn_kv"):
                target.bias = block.mask_argument
            patch.targets.append(target)
            for path, hook in target_hooks(patch, target):
                register(network.get_submodule(path), hook)
        patch.targets[-1].last = True
    follow_signals(network, patch)
    return patch


def blocks_to_merge(adapter: ModelAdapter, network: nn.Module, config: ToMeConfig) -> list[Block]:
    """Blocks within ``max_downsample`` that have a wanted target, checked.

    Raises:
        ToMeError: there are none, or merging them is not possible as asked.
    """
    name = type(network).__name__
    every = _with_all_targets(adapter.blocks(network), config.kinds)
    blocks = [block for block in every if any(kind in block.targets for kind in config.kinds)]
    if not blocks:
        known = dict.fromkeys(kind for block in every for kind in block.targets)
        there = (
            f"its blocks have {', '.join(known)}"
            if known
            else f"none of its modules is a block as in {adapter.description}. For blocks of your "
            "own write a model adapter: docs/adding_a_model.md"
        )
        raise ToMeError(
            f"{name} has no transformer block with a target {' or '.join(config.kinds)}, so there "
            f"is nothing to merge: {there}"
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
    for block in chosen:
        _check_block(block, config)
    _check_ratio(chosen, config)
    if config.across_frames and not adapter.has_frames:
        raise ToMeError(
            f"across_frames=True: {name} does not work frame by frame; leave it out (Wan and "
            "CogVideoX merge across frames as they are)"
        )
    return chosen


def _check_block(block: Block, config: ToMeConfig) -> None:
    """Refuse what a block's structure does not allow, in the words of its adapter."""
    for kind in config.kinds:
        if kind in block.refused:
            raise ToMeError(f"{block.name} cannot be merged at {kind!r}: {block.refused[kind]}")
        if config.prop_attn and kind in ("attn", "attn_kv") and block.mask_argument is None:
            raise ToMeError(
                f"prop_attn=True: self-attention of {block.name} takes no mask to weigh keys by; "
                "write prop_attn=False"
            )
        if kind in block.shared_input and config.residual:
            raise ToMeError(
                f"{block.name} takes queries, keys and values from what is merged at {kind!r}, so "
                "it cannot run unmerged at some steps; write residual=False"
            )


def _check_ratio(blocks: list[Block], config: ToMeConfig) -> None:
    """Refuse a schedule whose ratios are all for places that are not merged."""
    places = [
        Place(kind, block.downsample, depth, len(blocks))
        for depth, block in enumerate(blocks)
        for kind in config.kinds
        if kind in block.targets
    ]
    if not config.ratio_schedule.misses(places):
        return
    levels = ", ".join(map(str, sorted({place.downsample for place in places})))
    targets = ", ".join(dict.fromkeys(place.target for place in places))
    raise ToMeError(
        f"ratio={config.to_record()['ratio']!r} names no ratio for what is merged here: downsample "
        f"{levels}, targets {targets}. Name one of these, or choose others with max_downsample and "
        "targets"
    )


def _targets_in_running_order(
    block: Block, kinds: tuple[str, ...]
) -> Iterator[tuple[str, str, list[nn.Module]]]:
    """(name, kind, modules) of every target of a block, second attentions included."""
    for kind, modules in block.targets.items():
        if kind not in kinds:
            continue
        modules = list(modules) if isinstance(modules, (list, tuple)) else [modules]
        yield f"{block.name}.{kind}", kind, modules
        if kind in block.second_attention:
            yield f"{block.name}.{kind}_2", kind, [block.second_attention[kind]]


def _with_all_targets(blocks: list[Block], kinds: tuple[str, ...]) -> list[Block]:
    """The blocks with the targets that follow from what an adapter names.

    'attn_kv' is at the same module as 'attn', 'block' is the block itself; 'stack' is all blocks
    with the same grid at once, named after the first, which then represents them all.
    """
    if "stack" in kinds:
        stacks: dict[nn.Module, list[Block]] = {}
        for block in blocks:
            stacks.setdefault(block.grid_module, []).append(block)
        return [
            replace(members[0], targets={"stack": [block.module for block in members]})
            for members in stacks.values()
        ]
    return [replace(block, targets=_all_targets(block)) for block in blocks]


def _all_targets(block: Block) -> dict[str, Any]:
    targets: dict[str, Any] = {}
    for kind, modules in block.targets.items():
        targets[kind] = modules
        if kind == "attn":
            targets["attn_kv"] = modules
    return {**targets, "block": block.module}


def follow_signals(network: nn.Module, patch: TomePatch) -> None:
    """Learn of the ends of runs where merging keeps state between steps."""
    known = any(one.patch is patch for one in interceptors_of(network))
    if patch.config.tracks_steps and not known:
        intercept(network, RunSignals(patch))
