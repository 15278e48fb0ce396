# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What every runner does: request in; images, latents and times out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ToMeError
from ...settings import Setting
from ..request import INPUTS, Request
from .media import load_image

_OPTIONS = {
    "images": "--img",
    "masks": "--mask",
    "controls": "--control",
    "references": "--reference",
}


@dataclass
class Output:
    """One call of a model.

    Attributes:
        images: Per image a PIL image; of a video model a list of them, the frames.
        latents: (B, ...) float32 on the CPU: what the VAE decoded; None where it cannot be seen.
        seconds: Of the whole call, synchronized with the device.
        step_seconds: Of each step's call of the network (skipped ones too).
    """

    images: list[Any]
    latents: Tensor | None
    seconds: float
    step_seconds: list[float] = field(default_factory=list)

    @property
    def network_seconds(self) -> float:
        """The part of ``seconds`` that the network took."""
        return sum(self.step_seconds)


class Source(ABC):
    """What is to be run, before any weights are loaded.

    Attributes:
        name: Short name for folders and titles: the stem of a config or of a pipeline's folder.
        kind: ``'mmagic'`` or ``'diffusers'``.
        class_name: Of the model or pipeline, such as ``'StableDiffusion'``.
        setting: What the config itself applies; nothing for a bare pipeline.
        defaults: Fields of a :class:`Request` that the config states (``infer_cfg``).
        evaluation: What the config states for ``evaluate`` (``evaluation``).
        video: Whether it makes clips.
        path: The config's file, or the pipeline's folder or id, as the user wrote it.
    """

    name: str
    kind: str
    class_name: str
    setting: Setting
    defaults: dict[str, Any]
    evaluation: dict[str, Any]
    video: bool
    path: str

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raise ToMeError for the first thing that the model cannot serve; nothing is loaded.

        It is an input that the class needs or does not take, a file or weights that are not there,
        a size that does not fit.
        """

    @abstractmethod
    def load(
        self, request: Request, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Runner:
        """Load the weights; what the config applies is applied to the model (``setting``).

        ``dtype`` is that of the whole model. Default: None, that of the weights.

        Raises:
            ToMeError: The weights cannot be loaded; the model does not take the config's options.
        """


class Runner(ABC):
    """A loaded model with a request.

    Every image has its own noise, drawn on the CPU from its own seed: it is the same on every
    device and at every batch size.

    Attributes:
        source: The :class:`Source`; None of a runner around a model that was there already.
        model: What ``apply_tome`` and ``apply_cache`` take.
        network: The module whose calls are the steps of a run, skipped ones too.
        request: The :class:`Request`.
        device: Where the model is.
        steps, guidance: Of the request, else the class's defaults.
        size: (height, width) in pixels.
        video: Whether images are lists of frames.
        fps: Frames per second of clips.
        scheduler: Name of the scheduler's class, such as ``'DDIMScheduler'``.
        dtype: Of the network's weights.
    """

    source: Source | None
    model: Any
    network: nn.Module
    request: Request
    device: torch.device
    steps: int
    guidance: float
    size: tuple[int, int]
    video: bool
    fps: int
    scheduler: str
    dtype: torch.dtype

    @abstractmethod
    def run(
        self,
        numbers: Sequence[int],
        steps: int | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Output:
        """Generate some of the request's images in one call.

        Args:
            numbers: Which, counted from 0.
            steps: Denoising steps. Default: ``self.steps``.
            on_step: Called without arguments after each step.
        """


# --- checks ---------------------------------------------------------------------------------------


def check_inputs(
    name: str, request: Request, takes: Mapping[str, str], needs: Collection[str]
) -> None:
    """Fail for inputs that a class does not take, that it lacks, or that cannot be read.

    Args:
        name: Of the class.
        request: What to generate.
        takes: Those of :data:`INPUTS` that the class takes -> name of its argument.
        needs: Those of them that it needs, as fields of the request or in ``extra``.

    Raises:
        ToMeError: The first thing that does not fit.
    """
    for field_name in INPUTS:
        given, argument = getattr(request, field_name), takes.get(field_name)
        shown = f"{field_name} ({_OPTIONS[field_name]})"
        if given and argument is None:
            known = ", ".join(takes) or "text only"
            raise ToMeError(f"{name} takes no {shown}; leave them out (it takes: {known})")
        if not given and field_name in needs and argument not in request.extra:
            raise ToMeError(
                f"{name} needs {shown}, its {argument!r}: state one for all prompts, or one for "
                "each"
            )
        for image in flat(given):
            load_image(image)


def check_size(name: str, size: tuple[int, int] | None, unit: int) -> None:
    """Fail if a class cannot make images of a (height, width); None is its own size.

    Raises:
        ToMeError: A side is no multiple of ``unit``; states the nearest size.
    """
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
