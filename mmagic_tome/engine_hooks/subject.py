# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The model that a runner runs, and what its config says about generating with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mmengine.model import is_model_wrapper
from torch import nn

from ..apis.model_config import check_text_to_image
from ..apis.text2image import Request
from ..errors import ToMeError
from ..hosts import find_host

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
        find_host(model)
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


def request_of(runner, prompts: list[str], **given: Any) -> Request:
    """What to generate: ``given``, else ``infer_cfg`` of the runner's config, else defaults.

    Args:
        runner: mmengine's runner.
        prompts: of the pictures.
        **given: fields of :class:`~mmagic_tome.apis.text2image.Request`; None where not given.

    Raises:
        ToMeError: a value that cannot be.
    """
    from ..apis.command_line import check_default

    config = dict(getattr(runner, "cfg", {}).get("infer_cfg") or {})
    fields = {}
    for key in ("steps", "guidance", "size", "negative_prompt", "seed"):
        value = given.get(key)
        if value is None:
            value = config.get(key)
        if value is not None:
            fields[key] = check_default(key, value)
    return Request(prompts=prompts, **fields)
