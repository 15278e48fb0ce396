# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The model that a runner runs, and what its config says about generating with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from torch import nn

from ...apis.model_config import check_text_to_image
from ...apis.text2image import Request
from ...errors import ToMeError
from ...models import find_adapter

# Whether what the model does is a hook's business, and not the run's.
_aside = ContextVar("aside", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """Around what a hook has the model do, which the run's profile leaves out."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def is_aside() -> bool:
    """Whether an :func:`aside` is under way."""
    return _aside.get()


def model_of(runner, needed_by: str, generates: bool = False) -> nn.Module:
    """The runner's model, out of a wrapper for distributed training.

    Args:
        runner: mmengine's runner.
        needed_by: who asks; for the message.
        generates: whether it must make pictures from prompts.

    Raises:
        ToMeError: there is no diffusion model in it, or it needs more than a prompt.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    try:
        find_adapter(model)
    except ToMeError as error:
        raise ToMeError(
            f"{needed_by} needs a runner with a diffusion model, such as "
            f"model=dict(type='StableDiffusion', ...): {error}"
        ) from error
    if generates:
        try:
            check_text_to_image(type(model))
        except ToMeError as error:
            raise ToMeError(f"{needed_by}: {error}") from error
    return model


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """As for inference; weights, modes and random numbers bit for bit as they were afterwards.

    In eval mode, without gradients, and with the UNet in the type that the model infers with
    (``dtype`` of MMagic's models, float16 of its DreamBooth). Not by the model's own ``eval()``,
    which casts the UNet there and back: that would leave training weights rounded.
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


def request_of(runner, prompts: list[str], **given: Any) -> Request:
    """What to generate: ``given``, else ``infer_cfg`` of the runner's config, else defaults.

    Args:
        runner: mmengine's runner.
        prompts: of the pictures.
        **given: fields of :class:`~mmagic_tome.apis.text2image.Request`; None where not given.

    Raises:
        ToMeError: a value that cannot be.
    """
    from ...apis.command_line import check_default

    config = dict(getattr(runner, "cfg", {}).get("infer_cfg") or {})
    fields = {}
    for key in ("steps", "guidance", "size", "negative_prompt", "seed"):
        value = given.get(key)
        if value is None:
            value = config.get(key)
        if value is not None:
            fields[key] = check_default(key, value)
    return Request(prompts=prompts, **fields)
