# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What every runner does: request in; images, latents and times out."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ToMeError
from ...settings import Setting
from ..request import INPUTS, Request
from .media import load_image


@dataclass
class Output:
    """One call of a model."""

    images: list[Any]  #: per image a PIL image; of a video model a list of them, the frames
    latents: Tensor | None  #: (B, ...) float32 on the CPU that the VAE decoded; None if not seen
    seconds: float  #: of the whole call, synchronized with the device
    network_seconds: float  #: the part of it that calls of the network took, skipped ones too


class Source(ABC):
    """What is to be run, before any weights are loaded."""

    name: str  #: for folders and titles: the stem of a config or of a pipeline's folder
    class_name: str  #: of the model or pipeline, such as 'StableDiffusion'
    setting: Setting  #: what the config itself applies; nothing for a bare pipeline
    defaults: dict[str, Any]  #: fields of a Request that the config states (`infer_cfg`)
    evaluation: dict[str, Any]  #: what the config states for `evaluate` (`evaluation`)
    video: bool  #: whether it makes clips
    path: str  #: the config's file, or the pipeline's folder or id, as the user wrote it

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raise ToMeError for the first thing that the model cannot serve: an input that the class
        needs or does not take, a file that is not there, a size. Nothing is loaded."""

    @abstractmethod
    def load(
        self, request: Request, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Runner:
        """Load the weights, in the ``dtype`` of the whole model (default: that of the weights), and
        apply what the config applies (``setting``). ToMeError if one of these cannot be done."""


class Runner(ABC):
    """A loaded model with a request.

    Every image has its own noise, drawn on the CPU from its own seed: it is the same on every
    device and at every batch size.
    """

    source: Source | None  #: None for a model that was there already
    model: Any  #: what `apply_tome` and `apply_cache` take
    network: nn.Module  #: whose calls are the steps of a run, skipped ones too
    request: Request
    device: torch.device  #: where the model is
    steps: int  #: of the request, else the class's default
    guidance: float  #: of the request, else the class's default
    size: tuple[int, int]  #: height and width in pixels
    video: bool  #: whether images are lists of frames
    fps: int  #: frames per second of clips
    scheduler: str  #: name of its class, such as 'DDIMScheduler'
    dtype: torch.dtype  #: of the network's weights

    @property
    def settings(self) -> dict[str, Any]:
        """What images depend on besides prompts, seeds and method, as JSON has it; of a runner with
        a source."""
        return {
            "model": self.source.name,
            "source": self.source.path,
            "class_name": self.source.class_name,
            "steps": self.steps,
            "guidance": self.guidance,
            "size": "{}x{}".format(*self.size),
            "scheduler": self.scheduler,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    @abstractmethod
    def run(
        self,
        numbers: Sequence[int],
        steps: int | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Output:
        """Generate the request's images of these numbers, in so many denoising steps (default:
        ``self.steps``); ``on_step`` is called without arguments after each step."""


# --- checks ---------------------------------------------------------------------------------------


def check_inputs(
    name: str, request: Request, takes: Mapping[str, str], needs: Collection[str]
) -> None:
    """Raise ToMeError for inputs that a class does not take, that it lacks, or that cannot be read.

    Args:
        name: Of the class.
        request: What to generate.
        takes: Those of :data:`INPUTS` that the class takes -> name of its argument.
        needs: Those of them that it needs, as fields of the request or in ``extra``.
    """
    for kind, flag in zip(INPUTS, ("--img", "--mask", "--control", "--reference")):
        given, argument = getattr(request, kind), takes.get(kind)
        if given and argument is None:
            known = ", ".join(takes) or "text only"
            raise ToMeError(f"{name} takes no {kind} ({flag}); leave them out (it takes: {known})")
        if not given and kind in needs and argument not in request.extra:
            raise ToMeError(
                f"{name} needs {kind} ({flag}), its {argument!r}: state one for all prompts, or "
                "one for each"
            )
        for image in flat(given):
            load_image(image)


def check_size(name: str, size: tuple[int, int] | None, unit: int) -> None:
    """Raise ToMeError, which states the nearest size, if height or width in pixels is no multiple
    of ``unit``; None is the class's own size."""
    if size is not None and any(side % unit for side in size):
        near = "x".join(str(max(1, round(side / unit)) * unit) for side in size)
        raise ToMeError(
            f"size {size[0]}x{size[1]} does not fit {name}: height and width must be multiples of "
            f"{unit}; the nearest is {near}"
        )


def flat(images: Sequence[Any]) -> list[Any]:
    """Inputs in one list: an entry may be a list, such as of FastComposer's subjects."""
    lists = [one if isinstance(one, (list, tuple)) else [one] for one in images]
    return [image for one in lists for image in one]


# --- latents --------------------------------------------------------------------------------------


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
