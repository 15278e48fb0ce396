# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Remembers the plans of a model: which tokens became one, per step and block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..meters import step_module
from ..models import find_adapter
from ..patch import find_patch
from ..tome.state import TomePatch


@dataclass(frozen=True)
class Record:
    """The plan of one block at one step.

    Attributes:
        step (int): forward of the network, from 0.
        block (str): dotted path of the block.
        grid (tuple): (height, width) in tokens.
        slot (np.ndarray): (B, N) int32, the slot of every token.
    """

    step: int
    block: str
    grid: tuple[int, int]
    slot: np.ndarray

    @property
    def kept(self) -> int:
        """Number of slots."""
        return int(self.slot[0].max()) + 1


class PlanRecorder:
    """Records the plans that are made while it is entered, of the run that is under way.

    A timestep that goes up again begins a new run and drops what was recorded of the last. The
    model may get its token merging before or after the recorder. Compiled networks make plans
    where nobody can see them: record the eager one.

    Args:
        model: whatever ``apply_tome`` takes.

    Attributes:
        records (list): one :class:`Record` per block and step, in running order; of a block
            whose targets have plans of their own, the plan of the first.
    """

    def __init__(self, model: object) -> None:
        self.adapter, self.network = find_adapter(model)
        self.step_module = step_module(model)
        self.records: list[Record] = []
        self.step = -1
        self._time: float | None = None
        self._patch: TomePatch | None = None
        self._hooks: list[Any] = []
        self._block_hooks: list[Any] = []

    def __enter__(self) -> PlanRecorder:
        hook = self.step_module.register_forward_pre_hook(self._begins, with_kwargs=True)
        self._hooks.append(hook)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for hook in (*self._hooks, *self._block_hooks):
            hook.remove()
        self._hooks.clear()
        self._block_hooks.clear()
        self._patch = None

    def _begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        time = self.adapter.timestep(args, kwargs)
        if time is not None:
            time = float(torch.as_tensor(time).reshape(-1)[0])
        if time is None or self._time is None or time >= self._time:
            self.records, self.step = [], -1
        self._time = time
        self.step += 1
        patch = find_patch(self.network, TomePatch)
        if patch is self._patch:
            return
        # Behind merging's own hooks, which have made the plan by then.
        for hook in self._block_hooks:
            hook.remove()
        self._block_hooks.clear()
        self._patch = patch
        if patch is None:
            return
        merged = {block.name for block in patch.blocks}
        for block in self.adapter.blocks(self.network):
            if block.name in merged:
                hook = block.module.register_forward_pre_hook(self._note(block.name))
                self._block_hooks.append(hook)

    def _note(self, name: str):
        def note(module: nn.Module, args: tuple) -> None:
            context = self._patch.context
            plan = context.plan
            if plan is not None and plan.num_slots < plan.slot.shape[1]:
                slot = plan.slot.detach().to("cpu", torch.int32).numpy()
                self.records.append(Record(self.step, name, tuple(context.grid), slot))

        return note
