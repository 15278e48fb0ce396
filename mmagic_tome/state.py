# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the hooks of one network share, and for how long each part of it lives.

====================  =========================================================
:class:`MergeState`   as long as token merging is applied
:class:`Run`          one denoising run of one thread (:mod:`.temporal`)
:class:`Forward`      one call of the network in one thread
====================  =========================================================
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .config import ToMeConfig
from .graphs import prepare_compiler
from .merging import GridLayout, MergePlan, random_layout, regular_layout
from .models import Block, ModelAdapter
from .reuse import ScopeForward, ScopeState
from .temporal import Lanes, Residual, Run


class MergeState:
    """Everything the hooks of one network share."""

    def __init__(self, config: ToMeConfig, host: ModelAdapter) -> None:
        self.config = config
        self.host = host
        self.blocks: list[BlockState] = []
        self.sites: list[SiteState] = []
        self.hooks: list[RemovableHandle] = []
        # Parts that do not run at every step, and the modules' forwards that see to it.
        self.scopes: list[ScopeState] = []
        self.forwards_placed: list[ScopeForward] = []
        # (module, hook, whether it runs after the module), of all that were ever registered.
        self.placed: list[tuple[nn.Module, Any, bool]] = []
        # Of the ControlNets that were merged along with this network: they come and go together.
        self.branches: list[MergeState] = []
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
        # What leads compiled code is this thread's own, see below, or by now another thread's.
        return (self.forward,) if self.config.tracks_steps else (self.forward, self._compiled)

    def lead_compiled(self) -> None:
        """Let modules that are compiled on their own go by this thread's forward: what is decided
        by the step is decided here, outside of graphs."""
        if not torch.compiler.is_compiling():
            self._compiled = self.forward

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_threads"], state["_compiled"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._threads = threading.local()
        self._compiled = Forward()
        prepare_compiler()

    def hook(self, module: nn.Module, before: Any, after: Any = None) -> None:
        """Register a pre-hook and optionally a post-hook; :meth:`remove` takes them out."""
        self.placed.append((module, before, False))
        self._register(module, before, False)
        if after is not None:
            self.hook_after(module, after)

    def leave_out(self, scopes: list[ScopeState]) -> None:
        """Place forwards that need not run; :meth:`remove` takes them out."""
        self.scopes = scopes
        for scope in scopes:
            for index in range(len(scope.modules)):
                self.forwards_placed.append(ScopeForward(self, scope, index))

    def hook_after(self, module: nn.Module, after: Any) -> None:
        """Register a post-hook alone."""
        self.placed.append((module, after, True))
        self._register(module, after, True)

    def put_back(self) -> None:
        """Register again what :meth:`remove` took out."""
        for placed in self.placed:
            self._register(*placed)
        for forward in self.forwards_placed:
            forward.place()
        for branch in self.branches:
            branch.put_back()

    def _register(self, module: nn.Module, hook: Any, after: bool) -> None:
        register = module.register_forward_hook if after else module.register_forward_pre_hook
        self.hooks.append(register(hook, with_kwargs=True))

    @property
    def residual(self) -> Residual | None:
        """The residual in force: none while gradients are on, when steps are unrelated."""
        return None if torch.is_grad_enabled() else self.config.residual_plan

    def remove(self) -> None:
        """Take all hooks out of the network and forget the run."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for forward in reversed(self.forwards_placed):
            forward.remove()
        self.forget_run()
        for branch in self.branches:
            branch.remove()

    def forget_run(self) -> None:
        """Drop what is kept from step to step, in all threads."""
        self._threads = threading.local()
        self._compiled = Forward()

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
        noise (float | None): noise level, where the options depend on it.
        grid (tuple | None): (height, width) in tokens, of the stack that runs; of all frames of a
            clip, below each other, where they are merged together.
        before (int | list | None): how many tokens of the text are in front of the picture's, see
            :meth:`.models.ModelAdapter.num_text_tokens_before`.
        frames (int): of a clip, where they are merged together; 1 otherwise.
        layouts (dict): (downsample, height, width, device) -> :class:`GridLayout`.
        plans (dict): kind of site -> :class:`MergePlan` or None, of the block that runs. One
            place for all blocks, since they do not nest: so the hooks of all blocks are the
            same code to a compiler.
        shared (dict): what a plan depends on -> the plan, of the levels whose blocks share
            theirs.
        refreshing (bool): whether the block that runs renews what it keeps between steps.
        foretold (frozenset): names of the scopes that do not run in this forward, see
            :mod:`.reuse`; ``remembered``: of those whose output is kept.
        pending (dict): name of a site -> what its pre-hook leaves for its post-hook.
        lanes (Lanes): the denoising runs of this thread; they outlive the forward.
    """

    def __init__(self) -> None:
        self.lanes = Lanes()
        self.clear(running=False)

    def clear(self, running: bool) -> None:
        """Forget everything but the run, at the start (``running``) or the end of a forward."""
        self.running = running
        self.step: Tensor | None = None
        self.noise: float | None = None
        self.grid: tuple[int, int] | None = None
        self.before: int | list[int] | None = None
        self.frames = 1
        self.layouts: dict[tuple, GridLayout] = {}
        self.plans: dict[str, MergePlan | None] = {}
        self.shared: dict[tuple, MergePlan | None] = {}
        self.refreshing = True
        self.foretold: frozenset[str] = frozenset()
        self.remembered: frozenset[str] = frozenset()
        self.pending: dict[str, Any] = {}

    @property
    def run(self) -> Run:
        """The denoising run that this forward is a step of."""
        return self.lanes.run

    @property
    def plan(self) -> MergePlan | None:
        """The plan of the block that runs; of its first site where sites differ."""
        return next(iter(self.plans.values()), None)


class BlockState:
    """A block, its place among the blocks of its level, and the plans a backward may need."""

    def __init__(self, name: str, downsample: int, row: int, depth: int) -> None:
        self.name = name
        self.downsample = downsample
        self.row = row
        self.depth = depth
        self.kinds: tuple[str, ...] = ()
        self.text_beside = False
        self.plans = 0
        # Input tensor -> (config, plans, text before), for as long as the tensor lives: gradient
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
    """A wrapped module (or a chain of them) and what was seen there.

    ``modules`` run one after the other; what goes into the first is merged, what comes out of
    the last unmerged. ``last`` says whether it is the last of its block. The other attributes are
    what the host says of the block, see :class:`~.models.Block`.
    """

    def __init__(
        self, name: str, kind: str, block: BlockState, modules: list[nn.Module], host: Block
    ) -> None:
        self.name = name
        self.kind = kind
        self.block = block
        self.modules = modules
        self.context = host.context_argument
        # Where self-attention is told how many tokens each of its keys stands for; None: not told.
        self.weights: str | None = None
        self.returns = host.output_index.get(kind, 0)
        self.text_beside = kind in host.joint_sequence
        self.last = False
        self.tokens: int | None = None
        self.kept: int | None = None
        self.calls = 0
        self.dense_calls = 0

    def saw(self, tokens: int, kept: int) -> None:
        """Note a call."""
        self.tokens, self.kept = tokens, kept
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.dense_calls += kept == tokens
