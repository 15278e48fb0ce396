# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The network of a config's model or of a pipeline, called as the model itself calls it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ... import remove_cache, remove_tome
from ..runners.base import Runner, Source
from .base import Arguments, Work

_LATENTS = ("hidden_states", "sample", "x")


class SourceWork:
    """Work on the network of a source, loaded once per dtype.

    Args:
        source: With the model.
        device: Where to load it.
        steps: Denoising steps; 1 is a single forward.
        sizes: (height, width) to be asked for. Default: the model's own.
        batches: Images per call of the model. Default: 1.
        request: Given fields of the request. Default: a prompt.

    Raises:
        ToMeError: See :meth:`Source.check`.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        steps: int,
        sizes: Sequence[tuple[int, int]] | None,
        batches: Sequence[int] | None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.device, self.steps = source, device, steps
        self.sizes, self.batches = sizes or [None], batches or [1]
        # Few schedulers can do a single step.
        self.given = {"prompts": ["a red apple"], **(request or {}), "steps": max(2, steps)}
        self._loaded: dict[torch.dtype | None, Any] = {}
        for size, batch in itertools.product(self.sizes, self.batches):
            source.check(self._request(size, batch))

    def _request(self, size: tuple[int, int] | None, batch: int) -> Any:
        from ..runners import make_request

        prompts = list(itertools.islice(itertools.cycle(self.given["prompts"]), batch))
        given = {**self.given, "prompts": prompts, "batch_size": batch}
        return make_request(self.source, **(given if size is None else {**given, "size": size}))

    def __call__(self, size: tuple[int, int] | None, batch: int, dtype: torch.dtype | None) -> Work:
        """The work of one case; ``dtype`` defaults to that of the weights."""
        from ..runners import runner_of

        request = self._request(size, batch)
        if dtype not in self._loaded:
            self._loaded.clear()
            self._loaded[dtype] = self.source.load(request, self.device, dtype).model
        model = self._loaded[dtype]
        remove_tome(model)
        remove_cache(model)
        runner = runner_of(model, request, self.source)
        calls = record_calls(runner, range(batch))
        if self.steps == 1:
            return Work(runner.network, calls[:1], None, runner.size)
        scheduler = getattr(model, "test_scheduler", None) or getattr(model, "scheduler", None)
        return Work(runner.network, calls, scheduler, runner.size)


def record_calls(
    runner: Runner, numbers: Sequence[int], steps: int | None = None
) -> list[Arguments]:
    """The arguments of every call of the network in a run, all with the latents of the first.

    Latents of later steps belong to the baseline's outputs, and step caching checks that latents
    follow from its own; equal ones do.
    """
    calls: list[Arguments] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        name = next((name for name in _LATENTS if name in kwargs), None)
        if calls and args and _same_shape(args[0], calls[0][0][0]):
            args = (calls[0][0][0], *args[1:])
        elif calls and not args and _same_shape(kwargs.get(name), calls[0][1].get(name)):
            kwargs[name] = calls[0][1][name]
        calls.append((args, kwargs))

    hook = runner.network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        runner.run(numbers, steps)
    finally:
        hook.remove()
    return calls


def _same_shape(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
