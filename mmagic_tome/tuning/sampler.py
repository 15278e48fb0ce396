# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a search has to know of a scheduler: its timesteps, and whether it adds noise."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from ..models import find_adapter


class Trace:
    """Timesteps of all calls of a model's network while it is entered.

    Args:
        model: whatever ``apply_tome`` takes.

    Attributes:
        times (list of float): one per call that runs; None where a call says none.
    """

    def __init__(self, model: Any) -> None:
        self.adapter, self.network = find_adapter(model)
        self.times: list[float | None] = []
        self._hook: Any = None

    def _note(self, module, args, kwargs) -> None:
        time = self.adapter.timestep(args, kwargs)
        if time is not None:
            time = float(torch.as_tensor(time).reshape(-1)[0])
        self.times.append(time)

    def __enter__(self) -> Trace:
        self._hook = self.network.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hook.remove()


def adds_noise(scheduler: Any, steps: int) -> bool | None:
    """Whether a scheduler adds noise between its steps, such as ancestral and SDE ones.

    Found by trying: two runs from the same start, with the same predictions and different random
    numbers, end at the same place only without it.

    Args:
        scheduler: of diffusers or MMagic, or MMagic's wrapper of one of diffusers.
        steps: of a run.

    Returns:
        None where the scheduler cannot be run without a network.
    """
    # The wrapper cannot be copied: it asks itself for what it wraps, for ever.
    sampler = scheduler.scheduler if hasattr(type(scheduler), "_scheduler_cls") else scheduler
    try:
        ends = [_run(copy.deepcopy(sampler), steps, seed) for seed in (0, 1)]
    except Exception:  # whatever a scheduler that wants something else may raise
        return None
    return not torch.equal(*ends)


@torch.no_grad()
def _run(sampler: Any, steps: int, seed: int) -> torch.Tensor:
    shape = (1, 4, 8, 8)
    start = torch.Generator().manual_seed(0)
    sample = torch.randn(shape, generator=start)
    predicted = torch.randn(shape, generator=start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampler.set_timesteps(steps)
        if hasattr(sampler, "init_noise_sigma"):
            sample = sample * sampler.init_noise_sigma
        options = {}
        if "generator" in inspect.signature(sampler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(seed)
        for time in torch.as_tensor(sampler.timesteps):
            if hasattr(sampler, "scale_model_input"):
                sampler.scale_model_input(sample, time)
            sample = sampler.step(predicted, time, sample, **options)["prev_sample"]
    return sample
