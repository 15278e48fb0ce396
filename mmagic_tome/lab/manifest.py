# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the images of a run depend on, to be compared when a run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .environment import environment
from .methods import Method
from .request import INPUTS, Request
from .runners.base import Runner


def manifest_of(runner: Runner, methods: Sequence[Method]) -> dict[str, Any]:
    """The manifest of a run (see :meth:`~.results.RunFolder.writing`).

    The weights are those that were loaded, not the name of their file: a checkpoint that was
    replaced is noticed, one that was moved is no difference.
    """
    source, request = runner.source, runner.request
    where = environment(runner.device)
    return {
        "model": {
            "class_name": type(runner.model).__name__ if source is None else source.class_name,
            "weights": _weights(runner.model),
            "scheduler": runner.scheduler,
            "scheduler_config": _scheduler_config(runner.model),
        },
        "name": "model" if source is None else source.name,
        "request": {
            "images": len(request),
            "prompts": _digest(request),
            "steps": runner.steps,
            "guidance": runner.guidance,
            "size": list(runner.size),
            "frames": request.frames,
            "batch_size": request.batch_size,
            "extra": json.loads(json.dumps(dict(request.extra), default=str)),
        },
        "device": runner.device.type,
        "dtype": str(runner.dtype).replace("torch.", ""),
        "environment": {key: where[key] for key in ("gpu", "processor", "threads", "versions")},
        "methods": {method.name: method.to_dict() for method in methods},
    }


def _weights(model: Any) -> str:
    """A hash of all parameters and buffers of a model or pipeline, with their names."""
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", {})
    digest = hashlib.blake2b(digest_size=16)
    for part, module in sorted(parts.items()):
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in sorted(module.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                values = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _scheduler_config(model: Any) -> dict[str, Any] | None:
    """The scheduler's settings; MMagic's own schedulers do not tell theirs."""
    scheduler = getattr(model, "test_scheduler", None) or getattr(model, "scheduler", None)
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        return None
    # diffusers lists there, in any order, which settings a file did not name.
    settings = {key: value for key, value in config.items() if key != "_use_default_values"}
    # DPM-Solver's has an infinity, for which JSON has no word.
    return json.loads(json.dumps(settings, default=str), parse_constant=str)


def _digest(request: Request) -> str:
    """A hash of prompts, negative prompts, seeds and input images."""
    numbers = range(len(request))
    texts = [list(request.prompts), request.negatives(numbers), [*map(request.seed_of, numbers)]]
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16)
    for kind in INPUTS:
        for image in getattr(request, kind):
            is_file = isinstance(image, (str, Path))
            digest.update(Path(image).read_bytes() if is_file else image.tobytes())
    return digest.hexdigest()
