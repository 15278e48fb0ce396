# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the hooks of one network share, and for how long each part of it lives.

====================  =========================================================
:class:`TomePatch`    as long as token merging is applied
:class:`StepState`    one guidance branch of one denoising run
:class:`TomeContext`  one call of the network in one thread
====================  =========================================================
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import ToMeConfig
from ..merging import FramePlan, GridLayout, JointPlan, random_layout, regular_layout
from ..merging.keys import AttentionKeys
from ..patch import (
    Context,
    Patch,
    hooks_of,
    intercept,
    interceptors_of,
    keep_last,
    register,
    release,
    unregister,
)
from ..runs import RunTracker
from ..timeline import Timeline


@dataclass
class StepState:
    """What merging keeps between the steps of a run."""

    #: (block, kind) -> the plan that is reused.
    plans: dict[Hashable, Any] = field(default_factory=dict)
    #: (block, kind) that the ratio's schedule leaves alone at present.
    unmerged: set[Hashable] = field(default_factory=set)
    #: Block -> the step at which it last computed its plans.
    computed_at: dict[str, int] = field(default_factory=dict)


# Where steps are not tracked; nobody writes into it.
_NOTHING_KEPT = StepState()


class TomeContext(Context):
    """What the hooks know during one call of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = RunTracker(StepState)
        self.clear()

    def clear(self) -> None:
        """Forget the call."""
        self.config: ToMeConfig | None = None  #: in force for this call; None: merge nothing
        self.step_key: Tensor | None = None  #: of the random destinations, from the timestep
        self.step = 0  #: number of the step in its run, 0 where steps are not tracked
        self.remaining: float | None = None  #: share of the run, where options depend on it
        self.state = _NOTHING_KEPT  #: of the branch that is called
        #: (height, width) in tokens; of all frames of a clip, below each other, where they are
        #: merged together.
        self.grid: tuple[int, int] | None = None
        #: Text tokens in front of the image's, see ``ModelAdapter.num_text_tokens_before``.
        self.num_before: int | list[int] | None = None
        self.frames = 1  #: of a clip, where they are merged together; otherwise 1
        #: (downsample, height, width, kinds, device) -> all layouts of a level.
        self.layouts: dict[tuple, GridLayout] = {}
        #: Kind of target -> plan or None, of the block that runs. One place for all blocks, since
        #: they do not nest: so the hooks of all blocks are the same code to a compiler.
        self.plans: dict[str, Any] = {}
        self.pending: dict[str, Any] = {}  #: target -> what its pre-hook leaves its post-hook
        #: Of the attention that runs, where it merges or weighs keys.
        self.keys: AttentionKeys | None = None

    def forget_run(self) -> None:
        self.tracker.clear()

    @property
    def plan(self) -> Any:
        """The plan of the block that runs; of its first target where targets differ."""
        return next(iter(self.plans.values()), None)


@dataclass(eq=False)
class BlockState:
    """A block, its place among the others, and plans that a backward may need."""

    name: str  # dotted path
    kinds: tuple[str, ...]  # of target that are merged in it
    downsample: int  # how many times coarser its grid is than the network's input
    depth: int  # its number among the merged blocks
    num_blocks: int  # how many of those there are
    joint: bool  # whether it is called with text and image tokens in one sequence
    level: int  # its level's number among the merged ones, the finest being 0
    row: int  # its number among the blocks of its level
    rows: int  # how many of those there are
    plans: int = 0  # made for it
    #: Input tensor -> (config, plans, text before), for as long as the tensor lives: gradient
    #: checkpointing calls the block again during the backward with the same tensor, when its
    #: network has long gone on, perhaps to another step and size.
    saved: Any = field(default_factory=WeakTensorKeyDictionary)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "saved"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, saved=WeakTensorKeyDictionary())


@dataclass(eq=False)
class Target:
    """A module (or several that run one after the other) around which tokens are merged."""

    name: str  # dotted path of its block, and its kind
    kind: str  # see ToMeConfig.targets
    block: BlockState  # that it is part of
    paths: tuple[str, ...]  # of its modules: into the first merged, out of the last unmerged
    shared: tuple[str, ...]  # of further modules that receive the same input
    joint: bool  # whether it is called with text and image tokens in one sequence
    context_argument: str | None  # of its attention, for the tokens of keys and values
    output_index: int  # of the image's tokens in what it returns
    weighs: bool  # whether its attention weighs keys by their size
    bias: str | None  # argument of its attention for these weights; None: it takes no mask
    image_last: bool  # whether the image's keys follow all others
    last: bool = False  # of its block
    tokens: int | None = None  # of the image, at the last call
    kept: int | None = None  # of these, after merging
    calls: int = 0
    unmerged_calls: int = 0  # calls on all tokens
    merged_inside: bool = False  # whether its attention has ever merged keys and values itself

    def __post_init__(self) -> None:
        #: A block or stack, whose output is its input plus a change.
        self.whole = self.kind in ("block", "stack")
        #: Whether keys are weighed or merged inside of its attention.
        self.intercepted = self.weighs or self.kind == "attn_kv"

    def record(self, context: TomeContext, x: Tensor, plan: Any) -> None:
        """Note a call on tokens ``x``, in tokens of the image."""
        frames = plan.num_frames if isinstance(plan, FramePlan) else context.frames
        tokens = x.shape[1] * frames
        kept = tokens if plan is None else plan.num_slots
        text = 0
        if isinstance(plan, JointPlan):
            text = plan.num_text_tokens
        elif self.joint and context.grid is not None:
            # A backward that runs a block again does so when the grid is forgotten.
            text = x.shape[1] - context.grid[0] * context.grid[1]
        tokens, kept = tokens - text, kept - text
        self.tokens, self.kept = tokens, kept
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.unmerged_calls += kept == tokens

    def missed(self) -> None:
        """Note that the call that was recorded last ran on all tokens after all."""
        self.kept = self.tokens
        self.unmerged_calls += not torch.compiler.is_compiling()

    def tokens_of(self, output: Any) -> Tensor:
        """The image's tokens in what it returned."""
        return output if isinstance(output, Tensor) else output[self.output_index]

    def replaced(self, output: Any, tokens: Tensor) -> Any:
        """What it returned, with other tokens of the image."""
        if not isinstance(output, tuple):
            return tokens
        return (*output[: self.output_index], tokens, *output[self.output_index + 1 :])


class TomePatch(Patch):
    """Token merging in one network, which the :class:`ModelAdapter` describes.

    Another ``config`` takes effect at the next call. ``model`` is what the user passed; its
    scheduler places timesteps on the schedule.
    """

    context_type = TomeContext

    def __init__(self, config: ToMeConfig, adapter: Any, model: object) -> None:
        self.config = config
        self.adapter = adapter
        self.blocks: list[BlockState] = []
        self.targets: list[Target] = []
        self.timeline = Timeline(model, adapter.timestep_scale)
        self._places: list[tuple[Any, str, Target]] | None = None
        super().__init__()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_places": None}

    def reset_stats(self) -> None:
        """Set the counters of targets and blocks back to zero."""
        for target in self.targets:
            target.tokens = target.kept = None
            target.calls = target.unmerged_calls = 0
        for block in self.blocks:
            block.plans = 0

    def contexts_of_call(self) -> tuple[TomeContext, ...]:
        """The contexts of the call under way, by the options that it began with: another thread
        may have assigned others since."""
        context = self.context
        shared = (context.config or self.config).tracks_steps or context is self._compiled
        return (context,) if shared else (context, self._compiled)

    def layout(self, context: TomeContext, block: BlockState, device: torch.device) -> Any:
        """(destinations, sources) of a block; all layouts of a grid are drawn together."""
        config, (height, width) = context.config, context.grid
        key = (block.downsample, height, width, block.kinds, device)
        layouts = context.layouts.get(key)
        if layouts is None:
            cells = (height, width, *config.cell_of(height, width, block.kinds))
            if config.use_rand:
                # A layout per block of the level: every block decorrelates its choice from the
                # others' at no more launches than one layout takes.
                seeds = {"seed": config.seed, "step": context.step_key, "count": block.rows}
                layouts = random_layout(*cells, **seeds, device=device)
            else:
                layouts = regular_layout(*cells, device)
            context.layouts[key] = layouts
        return layouts.select(block.row if config.use_rand else 0)

    def settle(self, network: nn.Module) -> None:
        """Let hooks sit where they belong, whatever was changed since they were registered.

        An adapter (LoRA) that is put on a hooked module takes its place, and leaves it again; a
        user's pre-hook that is registered later would see merged tokens.
        """
        if self._places is None:
            self._places = [
                (weakref.ref(network.get_submodule(path.rpartition(".")[0])), path, target)
                for target in self.targets
                for path in {*target.paths[:1], *target.paths[-1:], *target.shared}
            ]
        for parent, path, target in self._places:
            module = parent()._modules.get(path.rpartition(".")[2])
            if module is None:
                continue
            first = path == target.paths[0] or path in target.shared
            before, after = module._forward_pre_hooks, module._forward_hooks
            # Only hooks have the attribute, and only this patch's hooks have it as a value.
            mine = getattr(next(reversed(before.values()), None), "patch", None) is self
            in_place = mine or not first
            if path == target.paths[-1]:
                mine = getattr(next(iter(after.values()), None), "patch", None) is self
                in_place = in_place and mine
            if not in_place:
                self._settle(network, target)

    def _settle(self, network: nn.Module, target: Target) -> None:
        from .target import target_hooks

        for path in {*target.paths, *target.shared}:
            module = network.get_submodule(path)
            mine = [one for one in hooks_of(module, self) if getattr(one, "target", 0) is target]
            if mine:
                for hook in mine:
                    if not hook.after:
                        keep_last(module, hook)
                continue
            # It took the place of the hooked module, which is now inside.
            for inner in module.modules():
                unregister(inner, self)
        for path, hook in target_hooks(self, target):
            module = network.get_submodule(path)
            if not any(type(one) is type(hook) for one in hooks_of(module, self)):
                register(module, hook)
        if target.intercepted:
            self._settle_interceptor(network.get_submodule(target.paths[0]), target)

    def _settle_interceptor(self, module: nn.Module, target: Target) -> None:
        """Let the interceptor of a target be on its first module, and not inside of it."""
        from .target import MergeKeys

        for one in module.modules():
            for interceptor in interceptors_of(one):
                if getattr(interceptor, "target", None) is target:
                    release(one, interceptor)
        intercept(module, MergeKeys(self, target))
