# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What every runner does: request in; images, latents and times out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...settings import Setting
from ..request import Request


@dataclass
class Output:
    """One call of a model.

    Attributes:
        images: Per image a PIL image; of a video model a list of them, the frames.
        latents: (B, ...) float32 on the CPU: what the VAE decoded; None where it cannot be seen.
        seconds: Of the whole call, synchronized with the device.
        step_seconds: Of each step's call of the network (skipped ones too).
        peak_memory: Bytes, on CUDA only.
    """

    images: list[Any]
    latents: Tensor | None
    seconds: float
    step_seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None

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
        """Fail if the model cannot serve the request; nothing is loaded.

        Raises:
            ToMeError: The first thing that does not fit: an input that the class needs or does not
                take, files or weights that are not there, a size that does not fit.
        """

    @abstractmethod
    def load(
        self,
        request: Request,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Runner:
        """Load the weights; what the config applies is applied to the model (``setting``).

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
