# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Skipping calls of a diffusers UNet or transformer: what all methods of this folder share.

A method is a :class:`Peer`: it decides at each step whether to skip, and estimates what the network
would have returned. :class:`Skipping` runs one inside a context manager and removes it exactly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab.methods import Method
from mmagic_tome.models import find_adapter
from mmagic_tome.timeline import scheduler_of

from .levels import denoised_of, level_at, output_of

#: What a method keeps of a call and estimates: the network's output, the clean latent that it
#: predicts, or the features in front of a UNet's last normalisation and convolution.
SPACES = ("output", "denoised", "features")


@dataclass(frozen=True)
class Call:
    """One call of the network.

    Args:
        step: of the run, from 0.
        steps: of the run.
        timestep: as the scheduler counts it.
        sample: the network's input, (B, ...) with both guidance halves where they are one batch.
        branch: 0 for the first call of a step, 1 for the second one, where a pipeline calls the
            network once per guidance branch.
        scheduler: of the pipeline.
    """

    step: int
    steps: int
    timestep: float
    sample: Tensor
    branch: int
    scheduler: Any


@dataclass
class History:
    """What was computed so far in one run of one branch, the oldest first."""

    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # their timesteps
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)  # in the method's space


class Peer:
    """Decides and estimates during one run; a new object is built for every run."""

    #: One of :data:`SPACES`.
    space = "output"

    def skips(self, call: Call, history: History) -> bool:
        """Whether to skip a step; asked once per step, at its first call."""
        raise NotImplementedError

    def estimate(self, call: Call, history: History) -> Tensor:
        """What stands in for the output of a skipped call, in the method's space."""
        raise NotImplementedError

    def computed(self, call: Call, history: History) -> None:
        """Note a computed call; its input and output are the last ones of the history."""

    def stepped(self, call: Call, output: Tensor, latents: Tensor) -> None:
        """Note what the scheduler did.

        Args:
            call: the first one of the step.
            output: what the scheduler received, guided.
            latents: the next latents, in the scheduler's own scale.
        """


class Skipping(AbstractContextManager):
    """A method in action: inside, calls of the network may be skipped.

    A new run begins at the first call, where the timestep rises, where the shape changes, and where
    the timestep stays but the input differs. A call at the same timestep with the same input is
    another guidance branch: it follows the decision of the first one. Leave the context after a
    run that was interrupted.

    Args:
        model: a pipeline, or another object with a network and a ``scheduler``.
        build: makes the method's state for a run.

    Raises:
        ToMeError: The model has no scheduler, or no network of a known family.

    Example:
        >>> with Skipping(pipeline, lambda: TaylorSeer(order=1, interval=2)) as skipping:
        ...     pipeline("a red apple")
        >>> skipping.steps
        ['computed', 'computed', 'computed', 'network', 'computed', ...]
    """

    def __init__(self, model: Any, build: Callable[[], Peer]) -> None:
        if scheduler_of(model) is None:
            raise ToMeError(
                f"step caching needs a scheduler, which a {type(model).__name__} does not have; "
                "pass the pipeline"
            )
        self.model, self.build = model, build
        self.network: nn.Module = find_adapter(model)[1]
        #: What each step of the last run computed: 'computed' the network, 'network' nothing,
        #: 'head' a UNet's last layers, 'first block' these and everything up to the end of its
        #: first block.
        self.steps: list[str] = []
        self._call: Call | None = None  # the last one
        self._undo: list[Callable[[], None]] = []

    # --- patching ---------------------------------------------------------------------------------

    def __enter__(self) -> Skipping:
        self._forward = self.network.forward
        self._signature = inspect.signature(self._forward)

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        _replace(self.network, "forward", forward, self._undo)
        self._captured: Tensor | None = None
        self._watched: list[Any] = []
        if self.build().space == "features":
            self._capture_features()
        return self

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._call, self._captured, self._watched = None, None, []
        self._begin()

    def _capture_features(self) -> None:
        head = getattr(self.network, "conv_norm_out", None)
        if head is None:
            raise ToMeError(
                f"{type(self.network).__name__} has no conv_norm_out, whose input would be kept; "
                "use a setting that keeps the output"
            )

        def capture(module: nn.Module, args: tuple[Tensor]) -> None:
            self._captured = args[0]

        self._undo.append(head.register_forward_pre_hook(capture).remove)

    def _watch(self, scheduler: Any) -> None:
        """Let the method know what the scheduler does, whichever the pipeline has by now."""
        if any(scheduler is one for one in self._watched):
            return
        self._watched.append(scheduler)
        step = scheduler.step

        @functools.wraps(step)
        def watched(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any):
            result = step(model_output, timestep, sample, *args, **kwargs)
            if self._call is not None and scheduler is self._call.scheduler:
                latents = result[0] if isinstance(result, tuple) else result.prev_sample
                self.peer.stepped(self._first, model_output, latents)
            return result

        _replace(scheduler, "step", watched, self._undo)

    # --- runs -------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.peer = self.build()
        self._histories: dict[int, History] = {}
        self._skip = False
        self._result: Any = None  # how the network returns its output

    def _place(self, sample: Tensor, timestep: float) -> Call:
        """Which call of which run this is."""
        last, scheduler = self._call, scheduler_of(self.model)
        same = last is not None and last.sample.shape == sample.shape
        if same and timestep == last.timestep and torch.equal(sample, last.sample):
            place = {"step": last.step, "branch": last.branch + 1, "steps": last.steps}
        elif same and timestep < last.timestep:
            place = {"step": last.step + 1, "branch": 0, "steps": last.steps}
        else:
            self._begin()
            self.steps = []
            self._watch(scheduler)
            left = sum(float(one) <= timestep for one in scheduler.timesteps)
            place = {"step": 0, "branch": 0, "steps": left}
        call = Call(timestep=timestep, sample=sample, scheduler=scheduler, **place)
        if not call.branch:
            self._first = call
        self._call = call
        return call

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._signature.bind(*args, **kwargs).arguments
        sample = arguments["sample" if "sample" in arguments else "hidden_states"]
        time = torch.as_tensor(arguments["timestep"]).flatten()[0].item()
        call = self._place(sample, float(time))
        history = self._histories.setdefault(call.branch, History())
        return self.answer(call, history, lambda: self._forward(*args, **kwargs))

    def answer(self, call: Call, history: History, forward: Callable[[], Any]) -> Any:
        """What the network's caller gets: computed by ``forward`` or estimated."""
        if not call.branch:
            self._skip = self.peer.skips(call, history)
        if self._skip and history.steps:
            return self.skipped(call, self.peer.estimate(call, history))
        result = forward()
        self.note(call, history, result)
        return result

    def note(self, call: Call, history: History, result: Any) -> None:
        """Keep what was computed."""
        self._result = result
        output = result[0] if isinstance(result, tuple) else result.sample
        if self.peer.space == "features":
            output = self._captured
        elif self.peer.space == "denoised":
            level = level_at(call.scheduler, call.timestep)
            kind = call.scheduler.config.prediction_type
            output = denoised_of(output, call.sample, level, kind)
        history.steps.append(call.step)
        history.times.append(call.timestep)
        history.inputs.append(call.sample)
        history.outputs.append(output)
        if not call.branch:
            self.steps.append("computed")
        self.peer.computed(call, history)

    def skipped(self, call: Call, estimate: Tensor, computed: str | None = None) -> Any:
        """The network's answer at a skipped call.

        Args:
            call: the call.
            estimate: in the method's space.
            computed: what to write into :attr:`steps`. Default: None, 'head' or 'network'.
        """
        output = estimate
        if self.peer.space == "features":
            computed = computed or "head"
            output = self.network.conv_norm_out(estimate)
            output = self.network.conv_out(self.network.conv_act(output))
        elif self.peer.space == "denoised":
            level = level_at(call.scheduler, call.timestep)
            kind = call.scheduler.config.prediction_type
            output = output_of(estimate, call.sample, level, kind)
        if not call.branch:
            self.steps.append(computed or "network")
        if isinstance(self._result, tuple):
            return (output,)
        return type(self._result)(sample=output)


def _replace(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    """Set an attribute of an object alone; ``undo`` gets what removes it exactly."""
    had, before = name in vars(owner), vars(owner).get(name)

    def restore() -> None:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    setattr(owner, name, value)
    undo.append(restore)


# --- methods --------------------------------------------------------------------------------------


def as_method(
    name: str, build: Callable[[], Peer], skipping: Callable[..., Skipping] = Skipping
) -> Method:
    """A method for the measuring core.

    Args:
        name: unique in a comparison.
        build: makes the state for a run.
        skipping: the context manager. Default: :class:`Skipping`.
    """
    build()  # a wrong option raises here

    def function(model: Any) -> Skipping:
        return skipping(model, build)

    function.__qualname__ = name
    return Method(name, function=function)


def check(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise :class:`ToMeError` if an option is not in ``low`` ... ``high``."""
    if not low <= value <= high:
        most = "" if high == float("inf") else f" and at most {high:g}"
        raise ToMeError(f"{name} must be at least {low:g}{most}, got {value!r}")


def in_window(call: Call, start: float, end: float) -> bool:
    """Whether a step lies between two shares of the run: ``start`` is inside, ``end`` outside."""
    return int(start * call.steps) <= call.step < int(end * call.steps)


def mean_abs(tensor: Tensor) -> float:
    """The mean absolute value, of the whole batch."""
    return float(tensor.abs().mean())
