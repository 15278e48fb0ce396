# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a merging method is, and the registry of methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ToMeError, nearest
from ..merging import MergePlan, tokens_to_remove

METHODS: dict[str, type[Method]] = {}

# What methods are called elsewhere -> their names here, for error messages.
_OTHER_NAMES = {
    "adaptive": "threshold",
    "catome": "threshold",
    "ibtm": "importance",
    "pruning": "prune",
    "tokendownsampling": "todo",
    "tokenfusion": "tofu",
    "tomesd": "tome",
}


@dataclass(frozen=True)
class PlanRequest:
    """What a method may know when it makes a plan, besides the tokens.

    Attributes:
        height, width (int): the grid; the tokens come row by row.
        sx, sy (int): cell size in tokens.
        downsample (int): how many times coarser the grid is than the network's input.
        level (int): the same counted from the finest grid among the merged blocks, that is 0.
        depth, depths (int): number of the block among the merged ones, and how many there are.
        step (int): step of the denoising run, 0 = first (always 0 where no step is tracked).
        noise (float | None): timestep as a share of the training steps, where it is tracked.
        exact (bool): full precision wanted in matching.
        layout (Callable): () -> (destinations (D,), sources (S,)) int64, one destination per
            cell, random or regular as the user chose.
        draw (Callable): (upper, count) -> (count,) int64 in [0, upper), random numbers of this
            block and step, the same at every call; at every step the same with
            ``use_rand=False``.
        heat (Tensor | None): (B / 2, h', w'), how far the text moved the prediction at every
            place of the network's output at the last step of the run; only for methods with
            ``watches_output``, None at the first step and without classifier-free guidance.
    """

    height: int
    width: int
    sx: int
    sy: int
    downsample: int
    level: int
    depth: int
    depths: int
    step: int
    noise: float | None
    exact: bool
    layout: Callable[[], tuple[Tensor, Tensor]]
    draw: Callable[[int, int], Tensor]
    heat: Tensor | None = None

    @property
    def cells(self) -> int:
        """Number of complete cells, hence of destinations of a grid layout."""
        return (self.height // self.sy) * (self.width // self.sx)


class Method:
    """A way to choose which tokens become one.

    Subclasses take their options as keyword arguments with defaults, check them in
    ``__init__`` (raising :class:`ToMeError`), and implement :meth:`plan`. They hold no state
    between calls.

    Attributes:
        keeps_queries (bool): merge keys and values of self-attention only.
        tracks_steps (bool): :meth:`plan` reads ``step`` or ``noise`` of its request.
        watches_output (bool): :meth:`plan` reads ``heat``.
        ceiling (float): largest ratio whatever the cells. Default 1: cells alone set it.
    """

    keeps_queries = False
    tracks_steps = False
    watches_output = False
    ceiling = 1.0

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> MergePlan | None:
        """A plan for tokens.

        Args:
            metric (Tensor): (B, N, C) floating, detached; the block's input.
            ratio (float): share of the tokens to remove, in [0, ceiling].
            request (PlanRequest): grid, cells, step and so on.

        Returns:
            MergePlan | None: None if there is nothing to merge.
        """
        raise NotImplementedError

    def variant(self, depth: int, depths: int) -> Hashable:
        """What the plan of a block has that only blocks of like depth have.

        Where all blocks of a level share a plan (``refresh=dict(share='level')``), one is made
        for each variant.

        Args:
            depth, depths (int): see :class:`PlanRequest`.

        Returns:
            Hashable: default None, the same for all.
        """
        return None

    def removed(self, tokens: int, ratio: float, request: PlanRequest) -> int:
        """r = min(int(N * ratio), sources); 0 for a grid without a complete cell."""
        cells = request.cells
        return tokens_to_remove(tokens, tokens - cells, ratio) if cells else 0


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: ``method='name'`` in a config means this class.

    Raises:
        ValueError: the name is taken by another class.
    """

    def register(cls: type[Method]) -> type[Method]:
        taken = METHODS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"a method {name!r} exists already: {taken.__qualname__}")
        METHODS[name] = cls
        return cls

    return register


def build_method(spec: str | Mapping[str, Any]) -> Method:
    """The method that ``method=...`` of a config names.

    Args:
        spec: a registered name, or a dict with the name under ``type`` and the method's options.

    Raises:
        ToMeError: unknown name or option, an option out of range.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"type": spec}
    if "type" not in options:
        raise ToMeError(
            f"method={options!r} names no method: write its name under 'type', such as "
            "dict(type='toma', window=4)"
        )
    name = options.pop("type")
    if not isinstance(name, str) or name not in METHODS:
        raise ToMeError(
            f"unknown method {name!r}: {_hint(str(name))}Known: {', '.join(sorted(METHODS))}"
        )
    cls = METHODS[name]
    known = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in known:
            raise ToMeError(
                f"method {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}"
            )
    return cls(**options)


def _hint(name: str) -> str:
    """What somebody may have meant who wrote a method's name in another way."""
    plain = "".join(char for char in name.lower() if char.isalnum())
    meant = _OTHER_NAMES.get(plain) or nearest(plain, METHODS)
    return f"did you mean {meant!r}? " if meant else ""
