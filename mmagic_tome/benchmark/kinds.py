# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a kind of network must say about itself so that it can be benchmarked.

Two things: its :class:`Shape`, by which ``--target`` knows it, and its :class:`Merging`, by which
contenders merge in it. A new kind is a file with a subclass of each and a dict of shapes, which
``targets.py`` adds to its own.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError

Call = Callable[[nn.Module], Tensor]
Noise = Callable[..., Tensor]

DENSE, OURS, TOMESD, MMAGIC, IDEAL = "dense", "ours", "tomesd", "mmagic", "ideal"
CONTENDERS = (DENSE, OURS, TOMESD, MMAGIC, IDEAL)


class Merging(ABC):
    """How tokens are merged in one kind of network.

    Attributes:
        contenders (tuple): those of :data:`CONTENDERS` that exist for it.
        denoises (bool): whether it is run step after step, at falling timesteps: then calls of
            its shapes take the timestep as their second argument.
    """

    contenders: tuple[str, ...] = (DENSE, OURS, IDEAL)
    denoises: bool = False

    @abstractmethod
    def options(self, args: argparse.Namespace) -> dict[str, Any]:
        """What the command line says that everybody is to merge, as options of a config.

        Raises:
            ToMeError: options that merge nothing.
        """

    @abstractmethod
    def config(self, options: Mapping[str, Any]) -> Any:
        """A config out of options; one that can be compared and has ``to_dict()``.

        Raises:
            ToMeError: an option that does not exist or cannot have that value.
        """

    def own(self, everybody: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """The config of one more of ours: its options win over everybody's."""
        return self.config({**everybody, **options})

    @abstractmethod
    def ours(self, network: nn.Module, config: Any, run: Call) -> list[dict[str, Any]]:
        """Put this package's techniques on a network and run it once.

        Returns:
            list: what was merged where: dicts with ``block``, ``kind``, ``tokens`` and ``kept``.
        """

    @abstractmethod
    def ideal(self, network: nn.Module, sites: list[dict[str, Any]], run: Call) -> None:
        """Let a network work on as many tokens as ``sites`` say, for free, and run it once."""

    def other(self, kind: str, network: nn.Module, config: Any, run: Call) -> None:
        """Put another library's token merging on a network and run it once.

        Args:
            kind: one of :attr:`contenders` besides dense, ours and the ideal.
        """
        raise NotImplementedError(kind)


@dataclass(frozen=True)
class Shape(ABC):
    """A network that can be built by name, with random weights.

    Attributes:
        about (str): one line for ``--help``.
        size (int): default side of the picture in pixels.
        batch (int): default batch of the network.
        counts (str | None): what the table shows per second, such as ``'images'``; an entry of
            the batch is one. None, the default: nothing.
    """

    about: str
    size: int
    batch: int
    counts: str | None = None

    @property
    @abstractmethod
    def merging(self) -> Merging:
        """How tokens are merged in it."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Pixels that height and width of the picture must be multiples of."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The network, built where torch's default device says (``meta``, to count weights)."""

    @abstractmethod
    def call(self, network: nn.Module, size: tuple[int, int], batch: int, noise: Noise) -> Call:
        """A function that runs a network of this shape on inputs that stay the same.

        Args:
            network: one of this shape.
            size: (height, width) of the picture in pixels, multiples of :attr:`unit`.
            batch: of the network.
            noise: makes Gaussian numbers of a shape, on the network's device in its precision.
        """

    @abstractmethod
    def activations(self, size: tuple[int, int], batch: int, written_out: bool) -> int:
        """About how many numbers a forward holds at its peak, above weights and inputs.

        Args:
            written_out: whether attention holds the scores of all pairs of tokens.
        """


def check_size(name: str, size: tuple[int, int], unit: int) -> None:
    """Raise :class:`ToMeError` unless both sides are multiples of ``unit`` pixels."""
    if any(side % unit for side in size):
        near = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
        raise ToMeError(
            f"size {size[0]}x{size[1]} does not fit {name}: height and width must be multiples "
            f"of {unit}; the nearest is {near}"
        )
