# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which blocks and targets of a network are merged, and the hooks on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import ToMeConfig
from ..errors import ToMeError
from ..models import Block, ModelAdapter
from ..patch import RunSignals, intercept, interceptors_of, register
from ..schedules import SELF_ATTENTION, Place
from .block import BlockPreHook
from .network import GridPreHook, NetworkPostHook, NetworkPreHook
from .state import BlockState, Target, TomePatch
from .target import MergeKeys, target_hooks


def place(
    config: ToMeConfig,
    adapter: ModelAdapter,
    network: nn.Module,
    blocks: list[Block],
    model: object,
) -> TomePatch:
    """Register hooks on a network, its grids, and the blocks and targets of
    :func:`blocks_to_merge`; ``model`` is what the user passed."""
    patch = TomePatch(config, adapter, model)
    paths = {id(module): path for path, module in network.named_modules(remove_duplicate=False)}
    register(network, NetworkPreHook(patch))
    register(network, NetworkPostHook(patch))
    of_level = [block.downsample for block in blocks]
    grids = set()
    for depth, block in enumerate(blocks):
        if block.grid_module not in grids:
            grids.add(block.grid_module)
            register(block.grid_module, GridPreHook(patch))
        kinds = tuple(kind for kind in config.kinds if kind in block.targets)
        merged = BlockState(
            block.name,
            kinds,
            block.downsample,
            depth,
            len(blocks),
            joint="block" in block.joint_sequence,
            level=sorted(set(of_level)).index(block.downsample),
            row=of_level[:depth].count(block.downsample),
            rows=of_level.count(block.downsample),
        )
        patch.blocks.append(merged)
        register(block.module, BlockPreHook(patch, merged))
        for name, kind, modules in _targets_of(block, kinds):
            described = "attn" if kind == "attn_kv" else kind
            target = Target(
                name,
                kind,
                merged,
                paths=tuple(paths[id(module)] for module in modules),
                shared=tuple(paths[id(one)] for one in block.shared_input.get(kind, ())),
                joint=described in block.joint_sequence,
                context_argument=block.context_argument,
                output_index=block.output_index.get(kind, 0),
                weighs=config.prop_attn and kind in SELF_ATTENTION and _takes_weights(block),
                bias=block.mask_argument,
                image_last=block.image_keys == "last",
            )
            patch.targets.append(target)
            if target.intercepted:
                intercept(modules[0], MergeKeys(patch, target))
            for path, hook in target_hooks(patch, target):
                register(network.get_submodule(path), hook)
        patch.targets[-1].last = True
    follow_signals(network, patch)
    return patch


def blocks_to_merge(adapter: ModelAdapter, network: nn.Module, config: ToMeConfig) -> list[Block]:
    """Blocks within ``max_downsample`` that have a wanted target; ToMeError if there are none, or
    merging them is not possible as asked."""
    name = type(network).__name__
    every = _with_all_targets(adapter.blocks(network), config)
    blocks = [block for block in every if not block.targets.keys().isdisjoint(config.kinds)]
    if not blocks:
        known = ", ".join(dict.fromkeys(kind for block in every for kind in block.targets))
        there = f"its blocks have {known}"
        if not known:
            there = (
                f"none of its modules is a block as in {adapter.description}. For blocks of your "
                "own write a model adapter: docs/howto/add_a_model.md"
            )
        raise ToMeError(
            f"{name} has no transformer block with a target {' or '.join(config.kinds)}, so there "
            f"is nothing to merge: {there}"
        )
    counts = Counter(block.downsample for block in blocks)
    finest = min(counts)
    limit = finest if config.max_downsample == "auto" else config.max_downsample
    chosen = [block for block in blocks if block.downsample <= limit]
    if not chosen:
        levels = ", ".join(
            f"{level} ({count} block{'s' * (count > 1)})" for level, count in sorted(counts.items())
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
        weighs = config.prop_attn is True and kind in SELF_ATTENTION
        if weighs and not _takes_weights(block):
            raise ToMeError(
                f"prop_attn=True: self-attention of {block.name} takes no mask to weigh keys by; "
                "write prop_attn=False"
            )


def _takes_weights(block: Block) -> bool:
    """Whether the keys of a block's self-attention can be weighed."""
    return block.mask_argument is not None or block.image_keys is not None


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
        f"ratio={config.to_dict()['ratio']!r} names no ratio for what is merged here: downsample "
        f"{levels}, targets {targets}. Name one of these, or choose others with max_downsample and "
        "targets"
    )


def _targets_of(block: Block, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, Any]]:
    """(name, kind, modules) of the targets of a block, in running order."""
    for kind, modules in block.targets.items():
        if kind in kinds:
            modules = modules if isinstance(modules, (list, tuple)) else [modules]
            yield f"{block.name}.{kind}", kind, modules
            second = block.second_attention.get("attn" if kind == "attn_kv" else kind)
            if second is not None:
                yield f"{block.name}.{kind}_2", kind, [second]


def _with_all_targets(blocks: list[Block], config: ToMeConfig) -> list[Block]:
    """The blocks with the targets that follow from what an adapter names.

    'attn_kv' is at the same module as 'attn', which it replaces where both are wanted; 'block' is
    the block itself; 'stack' is all blocks with the same grid at once, named after the first, which
    then represents them all.
    """
    if "stack" in config.kinds:
        stacks: dict[nn.Module, list[Block]] = {}
        for block in blocks:
            stacks.setdefault(block.grid_module, []).append(block)
        return [
            replace(members[0], targets={"stack": [block.module for block in members]})
            for members in stacks.values()
        ]
    wanted = config.targets != "auto" or config.merge_method.keeps_queries
    every = []
    for block in blocks:
        targets: dict[str, Any] = {}
        for kind, modules in block.targets.items():
            targets[kind] = modules
            if kind != "attn" or not (block.context_argument or block.image_keys):
                continue
            # Unweighed, keys and values are not worth it: then all of self-attention by default.
            if wanted or _takes_weights(block):
                targets["attn_kv"] = modules
                if "attn_kv" in config.kinds:
                    del targets["attn"]
        every.append(replace(block, targets={**targets, "block": block.module}))
    return every


def follow_signals(network: nn.Module, patch: TomePatch) -> None:
    """Learn of the ends of runs where merging keeps state between steps."""
    known = any(one.patch is patch for one in interceptors_of(network))
    if patch.config.tracks_steps and not known:
        intercept(network, RunSignals(patch))
