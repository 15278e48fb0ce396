# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Watches a call of a diffusers pipeline: seconds of its steps, latents that it decodes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import StepMarks
from .calls import DECODERS


class Steps:
    """Times the steps of a run. Some pipelines call the network twice per step, with and without
    the text; those tell when a step ends.

    Args:
        networks: Which are called.
        device: Where they are.
        on_step: Called without arguments after each step.
        told: Whether :meth:`step_ended` is called; if not, every call is a step.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        device: torch.device,
        on_step: Callable[[], object] | None,
        told: bool,
    ) -> None:
        self.on_step = on_step
        self.told = told
        self.count = 0
        # For each network the step of each of its calls.
        self.steps: list[list[int]] = [[] for _ in networks]
        self.marks = [
            StepMarks(network, device, functools.partial(self._called, calls))
            for network, calls in zip(networks, self.steps)
        ]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Steps:
        for marks in self.marks:
            self._stack.enter_context(marks)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _called(self, calls: list[int]) -> None:
        calls.append(self.count)
        if not self.told:
            self.step_ended()

    def step_ended(
        self, pipeline: Any = None, step: int = 0, time: Any = None, tensors: Any = None
    ) -> dict[str, Any]:
        """What diffusers calls ``callback_on_step_end``; changes nothing."""
        self.count += 1
        if self.on_step is not None:
            self.on_step()
        return {}

    def seconds(self) -> list[float]:
        """Seconds of each step with a call of a network."""
        found: dict[int, float] = {}
        for marks, calls in zip(self.marks, self.steps):
            for step, seconds in zip(calls, marks.seconds()):
                found[step] = found.get(step, 0.0) + seconds
        return [found[step] for step in sorted(found)]


@contextlib.contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def decoded_latents(pipeline: Any) -> contextlib.AbstractContextManager[list[Tensor]]:
    """Yields the latents of every call of ``vae.decode``, as they come."""
    parts = (getattr(pipeline, name, None) for name in DECODERS)
    vae = next((part for part in parts if hasattr(part, "decode")), None)
    return contextlib.nullcontext([]) if vae is None else first_arguments(vae, "decode")


@contextlib.contextmanager
def first_arguments(owner: Any, name: str) -> Iterator[list[Any]]:
    """Yields the first argument of every call of a method of an object, as they come."""
    found: list[Any] = []
    method, own = getattr(owner, name), vars(owner).get(name)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        found.append(args[0] if args else next(iter(kwargs.values())))
        return method(*args, **kwargs)

    # On the instance, where it hides the method of the class, or what hid that before.
    vars(owner)[name] = watched
    try:
        yield found
    finally:
        del vars(owner)[name]
        if own is not None:
            vars(owner)[name] = own


def joined(decoded: Sequence[Tensor], count: int) -> Tensor | None:
    """(count, ...) float32 on the CPU; frames that were decoded one after the other are put back
    together."""
    if not decoded:
        return None
    latents = torch.cat([part.detach().float().cpu() for part in decoded])
    if len(latents) == count:
        return latents
    return latents.unflatten(0, (count, -1)) if len(latents) % count == 0 else None
