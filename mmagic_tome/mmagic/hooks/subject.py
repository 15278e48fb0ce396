# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The model of a runner, and how its loops generate images with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.model import is_model_wrapper
from torch import nn

from ...errors import ToMeError
from ...lab.request import Request
from ...lab.runners import Output, runner_of
from ...lab.runners.media import to_tensor
from ...models import find_adapter


def model_of(runner, needed_by: str) -> nn.Module:
    """The model of mmengine's runner, without a wrapper for distributed training; ToMeError, which
    says what needs it, if it is no diffusion model."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    try:
        find_adapter(model)
    except ToMeError as error:
        raise ToMeError(
            f"{needed_by} needs a runner with a diffusion model, such as "
            f"model=dict(type='StableDiffusion', ...): {error}"
        ) from error
    return model


def iteration_of(runner) -> int:
    """Iterations of the training that is under way, otherwise 0.

    ``runner.iter`` builds the training loop and its data set where there is no training.
    """
    from mmengine.runner.base_loop import BaseLoop  # whose package imports the hooks

    return runner.iter if isinstance(runner._train_loop, BaseLoop) else 0


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients, and with the UNet in the dtype of the model's inference.

    Afterwards weights, modes and random numbers are the same to the last bit. The model's own
    ``eval()`` casts the UNet there and back, which rounds weights that are being trained.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters())
    devices = [parameter.device] if parameter.is_cuda else []
    dtype = getattr(model, "dtype", None)
    held = []
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            if isinstance(dtype, torch.dtype):
                for tensor in (*model.unet.parameters(), *model.unet.buffers()):
                    if tensor.is_floating_point() and tensor.dtype != dtype:
                        held.append((tensor, tensor.data))
                        tensor.data = tensor.data.to(dtype)
            yield
        finally:
            for tensor, data in held:
                tensor.data = data
            for module, training in modes:
                module.training = training


def generate(model: nn.Module, request: Request, steps: int | None = None) -> Output:
    """All images of a request in one batch, with whatever is applied to the model; ``images`` as
    :func:`to_tensor` returns them, and ``seconds`` of one image."""
    output = runner_of(model, request).run(range(len(request)), steps)
    output.images, output.seconds = to_tensor(output.images), output.seconds / len(request)
    return output
