# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The network of a config's model or of a pipeline, called as the model itself calls it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..apply import remove_cache, remove_tome
from ..timeline import scheduler_of
from .cost import record_calls
from .networks import Work
from .request import Request, make_request
from .runners import runner_of
from .runners.base import Source


class SourceWork:
    """Work on the network of a source, loaded once per dtype.

    Args:
        source: With the model.
        device: Where to load it.
        steps: Denoising steps; 1 is a single forward.
        request: Given fields of the request. Default: a prompt.
    """

    def __init__(
        self, source: Source, device: torch.device, steps: int, request: Mapping[str, Any] | None
    ) -> None:
        self.source, self.device, self.steps = source, device, steps
        # Few schedulers can do a single step.
        self.given = {"prompts": ["a red apple"], **(request or {}), "steps": max(2, steps)}

    def request(self, size: tuple[int, int] | None, batch: int) -> Request:
        """The request of one case; checked before weights are loaded.

        Raises:
            ToMeError: See :meth:`Source.check`.
        """
        prompts = list(itertools.islice(itertools.cycle(self.given["prompts"]), batch))
        given = {**self.given, "prompts": prompts, "batch_size": batch}
        request = make_request(self.source, **(given if size is None else {**given, "size": size}))
        self.source.check(request)
        return request

    def load(self, request: Request, dtype: torch.dtype | None) -> nn.Module:
        """The model, as it comes, in a dtype (default: that of its weights)."""
        return self.source.load(request, self.device, dtype).model

    def __call__(self, model: nn.Module, request: Request) -> tuple[Work, tuple[int, int]]:
        """The work of one case, and its height and width in pixels."""
        remove_tome(model)
        remove_cache(model)
        runner = runner_of(model, request, self.source)
        calls = record_calls(runner, range(request.batch_size))
        if self.steps == 1:
            return Work(runner.network, calls[:1], None), runner.size
        return Work(runner.network, calls, scheduler_of(model)), runner.size
