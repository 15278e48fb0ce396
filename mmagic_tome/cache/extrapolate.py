# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Outputs of past steps, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..graphs import eager_only

_TENSOR = object()  # the place of a tensor among the leaves of an output


def extrapolate(
    times: Sequence[float], outputs: Sequence[Tensor], time: float, slope: Tensor | None = None
) -> Tensor:
    """A new tensor: the value at ``time`` of the polynomial through outputs at some times.

    ::

        order 0   D(t) ~ D(t2)
        order 1   D(t) ~ D(t2) + (t - t2) / (t2 - t1) * (D(t2) - D(t1))
        order 2   the parabola through three

    Args:
        times: timesteps, all different; one more than the order.
        outputs: tensors of one shape.
        time: where to evaluate; between two of ``times`` it is an interpolation.
        slope: (images,) of order 1: times the slope of the line; 1 is the line, 0 holds the last
            output, below 0 what alternates is foreseen. Default: the line.
    """
    if len(times) == 1:
        return outputs[0].clone()
    if len(times) == 2:
        before, after = times
        if slope is None:
            return torch.lerp(*outputs, (time - before) / (after - before))
        return torch.lerp(
            *outputs, 1 + (time - after) / (after - before) * _per_image(slope, outputs[1])
        )
    total: Tensor | None = None
    for i, output in enumerate(outputs):
        # Lagrange: 1 at the output's own time, 0 at the others.
        others = [*times[:i], *times[i + 1 :]]
        weight = math.prod((time - other) / (times[i] - other) for other in others)
        total = output * weight if total is None else total.add_(output, alpha=weight)
    return total


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values of the images in the shape that multiplies ``like``, whose batch has one or more
    copies of the images, for guidance."""
    values = values.to(like.device, like.dtype, non_blocking=True)
    if values.dim() == 0:  # of one image without a batch
        return values
    return values.repeat(len(like) // len(values)).reshape(-1, *[1] * (like.dim() - 1))


class OutputHistory:
    """The last outputs of a region in one run: copies, in whatever structure they came; ``order``
    and ``error_feedback`` as in :class:`~.config.StepCacheConfig`."""

    def __init__(self, order: int, error_feedback: float) -> None:
        self.order = order
        self.error_feedback = error_feedback
        self.times: list[float] = []
        self.outputs: list[list[Tensor]] = []
        # Arguments of :meth:`extrapolate` since the last computed step: what it returned follows.
        self.guesses: list[tuple[float, Tensor | None]] = []
        self._leaves: list[Any] = []
        self._structure: Any = None

    @eager_only()
    def record(self, time: float, output: Any, feedback: bool = True) -> Any:
        """Note a computed output; return the output to go on with, see ``error_feedback``, or the
        same one without ``feedback``."""
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self.outputs and _shapes(tensors) != _shapes(self.outputs[-1]):
            self.times, self.outputs, self.guesses = [], [], []
        guesses = [(at, self._guess(at, slope)) for at, slope in self.guesses if feedback]
        self.guesses = []
        if self.times and self.times[-1] == time:  # two evaluations at one timestep
            self.times, self.outputs = self.times[:-1], self.outputs[:-1]
        # Interpolation between neighbours takes two, whatever the order.
        kept = max(self.order, self.error_feedback > 0)
        # Copies: whoever gets the output may change it in place.
        copies = [tensor.detach().clone() for tensor in tensors]
        self.times = [*self.times, time][-1 - kept :]
        self.outputs = [*self.outputs, copies][-1 - kept :]
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._structure = structure
        if not guesses or len(self.times) < 2:
            return output
        mended = list(tensors)
        for at, guess in guesses:
            for i, neighbours in enumerate(zip(*self.outputs[-2:])):
                truth = extrapolate(self.times[-2:], neighbours, at)
                mended[i] = mended[i] + self.error_feedback * (truth - guess[i])
        return self._in_structure(mended)

    @eager_only()
    def extrapolate(self, time: float, slope: Tensor | None = None) -> Any:
        """The output at a timestep, in the structure of the last one; ``slope`` as of
        :func:`extrapolate`."""
        if self.error_feedback:
            self.guesses.append((time, slope))
        return self._in_structure(self._guess(time, slope))

    def _guess(self, time: float, slope: Tensor | None) -> list[Tensor]:
        last = slice(-1 - self.order, None)
        every = list(zip(*self.outputs[last]))
        # Some models return a list with a tensor per image (Z-Image).
        one_each = slope is not None and len(every) > 1
        slopes = [slope[i % len(slope)] if one_each else slope for i in range(len(every))]
        return [
            extrapolate(self.times[last], outputs, time, own) for outputs, own in zip(every, slopes)
        ]

    def _in_structure(self, tensors: Sequence[Tensor]) -> Any:
        found = iter(tensors)
        leaves = [next(found) if leaf is _TENSOR else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._structure)


def placeholder(output: Any) -> Any:
    """An output with tensors that have shape, type and device, but no memory: of stride 0."""
    return _map(lambda x: x.new_zeros(()).expand(x.shape), output)


def undefined_like(placeholder: Any) -> Any:
    """An output with tensors of undefined values, which callers may write into."""
    contiguous = torch.contiguous_format
    return _map(lambda x: torch.empty_like(x, memory_format=contiguous), placeholder)


def _map(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, output)


def _shapes(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
