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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import ToMeConfig
from ..merging import FramePlan, GridLayout, JointPlan, random_layout, regular_layout
from ..merging.random import hashed_integers
from ..patch import Context, Patch, hooks_of, keep_last, register, unregister
from ..runs import RunTracker
from ..timeline import Timeline


class StepState:
    """What merging keeps between the steps of a run.

    Attributes:
        plans (dict): (block, kind) -> the plan that is reused.
        unmerged (set): (block, kind) that the ratio's schedule leaves alone at present.
        computed_at (dict): block -> the step at which it last computed its plans.
        residuals (dict): target -> what merging lost there at that step.
        guidance_map (Tensor | None): (B / 2, h, w), how far the text moved the last step's
            prediction at every place; for methods that watch the output.
    """

    def __init__(self) -> None:
        self.plans: dict[Hashable, Any] = {}
        self.unmerged: set[Hashable] = set()
        self.computed_at: dict[str, int] = {}
        self.residuals: dict[str, Tensor] = {}
        self.guidance_map: Tensor | None = None


# Where steps are not tracked; nobody writes into it.
_NOTHING_KEPT = StepState()


class TomeContext(Context):
    """What the hooks know during one call of the network.

    Attributes:
        config (ToMeConfig | None): the options in force for this call; None: merge nothing.
        step_key (Tensor | None): key of the random destinations, from the timestep.
        step (int): number of the step in its run, 0 where steps are not tracked.
        remaining (float | None): share of the run that remains, where the options depend on it.
        state (StepState): of the branch that is called.
        grid (tuple | None): (height, width) in tokens; of all frames of a clip, below each other,
            where they are merged together.
        num_before (int | list | None): text tokens in front of the image's, see
            ``ModelAdapter.num_text_tokens_before``.
        frames (int): of a clip, where they are merged together; otherwise 1.
        layouts (dict): (downsample, height, width, device) -> :class:`GridLayout`.
        plans (dict): kind of target -> plan or None, of the block that runs. One place for all
            blocks, since they do not nest: so the hooks of all blocks are the same code to a
            compiler.
        shared (dict): what a plan depends on -> the plan, of levels that share theirs.
        computes (bool): whether the block that runs computes its plans at this step.
        pending (dict): target -> what its pre-hook leaves for its post-hook.
        network (nn.Module | None): the network that runs, where targets run a second time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tracker = RunTracker(StepState)
        self.clear()

    def clear(self) -> None:
        """Forget the call."""
        self.config: ToMeConfig | None = None
        self.step_key: Tensor | None = None
        self.step = 0
        self.remaining: float | None = None
        self.state = _NOTHING_KEPT
        self.grid: tuple[int, int] | None = None
        self.num_before: int | list[int] | None = None
        self.frames = 1
        self.layouts: dict[tuple, GridLayout] = {}
        self.plans: dict[str, Any] = {}
        self.shared: dict[tuple, Any] = {}
        self.computes = True
        self.pending: dict[str, Any] = {}
        self.network: nn.Module | None = None

    def forget_run(self) -> None:
        self.tracker.clear()

    @property
    def plan(self) -> Any:
        """The plan of the block that runs; of its first target where targets differ."""
        return next(iter(self.plans.values()), None)


class BlockState:
    """A block, its place among the others, and plans that a backward may need.

    Args:
        name (str): dotted path.
        kinds (tuple): kinds of target that are merged in it.
        downsample (int): how many times coarser its grid is than the network's input.
        depth, num_blocks (int): its number among the merged blocks, and how many there are.
        joint (bool): whether it is called with text and image tokens in one sequence.
    """

    def __init__(
        self,
        name: str,
        kinds: tuple[str, ...],
        downsample: int,
        depth: int,
        num_blocks: int,
        joint: bool,
    ) -> None:
        self.name = name
        self.kinds = kinds
        self.downsample = downsample
        self.depth = depth
        self.num_blocks = num_blocks
        self.joint = joint
        # Its level's number among the merged ones, the finest being 0; its own number in its level,
        # and how many blocks that has.
        self.level = self.row = 0
        self.rows = 1
        self.plans = 0
        # Input tensor -> (config, plans, text before), for as long as the tensor lives: gradient
        # checkpointing calls the block again during the backward with the same tensor, when
        # its network has long gone on, perhaps to another step and size.
        self.saved = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "saved"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.saved = WeakTensorKeyDictionary()


class Target:
    """A module (or several that run one after the other) around which tokens are merged.

    Attributes:
        name (str): dotted path of its block, and its kind.
        kind (str): see ``ToMeConfig.targets``.
        block (BlockState): the block that it is part of.
        paths (tuple): dotted paths of its modules: the first one's input is merged, the last one's
            output unmerged; ``shared``: of further modules that receive the same input.
        whole (bool): a block or stack, whose output is its input plus a change.
        joint (bool): whether it is called with text and image tokens in one sequence.
        bias (str | None): argument of its attention for log(size) of the keys; None: not given.
        last (bool): whether it is the last target of its block.
        tokens, kept (int | None): tokens of the image at the last call, and after merging.
        calls, unmerged_calls (int): how often it ran, and ran on all tokens.
    """

    def __init__(self, name: str, kind: str, block: BlockState, description: Any) -> None:
        self.name = name
        self.kind = kind
        self.block = block
        self.paths: tuple[str, ...] = ()
        self.shared: tuple[str, ...] = ()
        self.whole = kind in ("block", "stack")
        self.joint = kind in description.joint_sequence
        self.context_argument = description.context_argument
        self.output_index = description.output_index.get(kind, 0)
        self.bias: str | None = None
        self.last = False
        self.tokens: int | None = None
        self.kept: int | None = None
        self.calls = 0
        self.unmerged_calls = 0

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

    def tokens_of(self, output: Any) -> Tensor:
        """The image's tokens in what it returned."""
        return output if isinstance(output, Tensor) else output[self.output_index]

    def replaced(self, output: Any, tokens: Tensor) -> Any:
        """What it returned, with other tokens of the image."""
        if not isinstance(output, tuple):
            return tokens
        return (*output[: self.output_index], tokens, *output[self.output_index + 1 :])


class TomePatch(Patch):
    """Token merging in one network.

    Args:
        config (ToMeConfig): the options; assigning others takes effect at the next call.
        adapter (ModelAdapter): describes the network.
        model: what the user passed; its scheduler places timesteps on the schedule.
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

    def contexts_of_call(self) -> tuple[TomeContext, ...]:
        """The contexts of the call under way, by the options that it began with: another thread
        may have assigned others since."""
        context = self.context
        shared = (context.config or self.config).tracks_steps or context is self._compiled
        return (context,) if shared else (context, self._compiled)

    def layout(self, context: TomeContext, block: BlockState, device: torch.device) -> Any:
        """(destinations, sources) of a block; all layouts of a grid are drawn together."""
        config, (height, width) = context.config, context.grid
        key = (block.downsample, height, width, device)
        layouts = context.layouts.get(key)
        if layouts is None:
            if config.use_rand:
                # A layout per block of the level: every block decorrelates its choice from the
                # others' at no more launches than one layout takes.
                layouts = random_layout(
                    height,
                    width,
                    config.sx,
                    config.sy,
                    seed=config.seed,
                    step=context.step_key,
                    count=block.rows,
                    device=device,
                )
            else:
                layouts = regular_layout(height, width, config.sx, config.sy, device)
            context.layouts[key] = layouts
        return layouts.select(block.row if config.use_rand else 0)

    def draw(
        self, context: TomeContext, block: BlockState, device: torch.device, upper: int, count: int
    ) -> Tensor:
        """(count,) random numbers below ``upper`` of a block and step, for methods that ask."""
        # The upper half of the seed tells the blocks apart, and these numbers from the layouts'.
        seed = context.config.seed + (block.depth + 1 << 32)
        return hashed_integers(upper, seed, context.step_key, 1, count, device)[0]

    # --- placement --------------------------------------------------------------------------------

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
