# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Outputs of past steps, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..graphs import eager_only

_TENSOR = object()  # the place of a tensor among the leaves of an output


def extrapolate(times: Sequence[float], outputs: Sequence[Tensor], time: float) -> Tensor:
    """Value at ``time`` of the polynomial through outputs of one tensor at some times.

    ::

        order 0   D(t) ~ D(t2)
        order 1   D(t) ~ D(t2) + (t - t2) / (t2 - t1) * (D(t2) - D(t1))
        order 2   the parabola through three

    Args:
        times: timesteps, all different; one more than the order of the polynomial.
        outputs: tensors of one shape.
        time: where to evaluate; between two of ``times`` it is an interpolation.

    Returns:
        Tensor: a new tensor: the caller may change it in place.
    """
    if len(times) == 1:
        return outputs[0].clone()
    if len(times) == 2:
        before, after = times
        return torch.lerp(*outputs, (time - before) / (after - before))
    total: Tensor | None = None
    for i, output in enumerate(outputs):
        # Lagrange: 1 at the output's own time, 0 at the others.
        others = [*times[:i], *times[i + 1 :]]
        weight = prod((time - other) / (times[i] - other) for other in others)
        total = output * weight if total is None else total.add_(output, alpha=weight)
    return total


def feed_back(
    output: Tensor, guesses: Sequence[Tensor], truths: Sequence[Tensor], fraction: float
) -> Tensor:
    """An output plus a fraction of what skipped steps before it got wrong.

    Args:
        output: of the present step.
        guesses: what was used at the skipped steps.
        truths: what these outputs should have been, by interpolation.
        fraction: in [0, 1].
    """
    for guess, truth in zip(guesses, truths):
        output = output + fraction * (truth - guess)
    return output


class OutputHistory:
    """The last outputs of a region in one run: copies, in whatever structure they came.

    Args:
        order (int): of extrapolation.
        error_feedback (float): see :class:`~.config.StepCacheConfig`.
    """

    def __init__(self, order: int, error_feedback: float) -> None:
        self.order = order
        self.error_feedback = error_feedback
        self.times: list[float] = []
        self.outputs: list[list[Tensor]] = []
        # (timestep, what was extrapolated) since the last computed step.
        self.guesses: list[tuple[float, list[Tensor]]] = []
        self._leaves: list[Any] = []
        self._structure: Any = None

    def __len__(self) -> int:
        """How many outputs are known."""
        return len(self.times)

    @eager_only()
    def record(self, time: float, output: Any) -> Any:
        """Note a computed output; return the output to go on with, see ``error_feedback``."""
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self.outputs and _shapes(tensors) != _shapes(self.outputs[-1]):
            self.times, self.outputs, self.guesses = [], [], []
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
        guesses, self.guesses = self.guesses, []
        if not guesses or len(self.times) < 2:
            return output
        times, neighbours = self.times[-2:], self.outputs[-2:]
        mended = [
            feed_back(
                tensor,
                [guess[i] for _, guess in guesses],
                [extrapolate(times, [one[i] for one in neighbours], at) for at, _ in guesses],
                self.error_feedback,
            )
            for i, tensor in enumerate(tensors)
        ]
        return self._in_structure(mended)

    @eager_only()
    def extrapolate(self, time: float) -> Any:
        """The output at a timestep, in the structure of the last one."""
        last = slice(-1 - self.order, None)
        guesses = [
            extrapolate(self.times[last], outputs, time) for outputs in zip(*self.outputs[last])
        ]
        if self.error_feedback:
            self.guesses.append((time, [guess.clone() for guess in guesses]))
        return self._in_structure(guesses)

    def _in_structure(self, tensors: Sequence[Tensor]) -> Any:
        found = iter(tensors)
        leaves = [next(found) if leaf is _TENSOR else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._structure)


class Placeholder:
    """Shapes of an output that nobody reads while its region is skipped."""

    def __init__(self, output: Any) -> None:
        # Stride 0: a shape, a type and a device without memory.
        self._shapes = tree_map(
            lambda x: x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else x, output
        )

    def make(self) -> Any:
        """Tensors of these shapes with undefined values; callers may write into them."""
        return tree_map(
            lambda x: (
                torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x
            ),
            self._shapes,
        )


def _shapes(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
