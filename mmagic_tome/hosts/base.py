# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The vocabulary in which a host describes its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn


@dataclass(frozen=True)
class Block:
    """A transformer block and the sites around which its tokens can be merged.

    Attributes:
        name (str): dotted path of the block inside the network.
        module (nn.Module): called with (B, N, C) tokens as its first argument
            or as ``hidden_states``; what it is given is the metric.
        stack (nn.Module): the module whose input shows the token grid.
        downsample (int): how many times coarser the block's grid is than the
            network's input, per side.
        sites (dict): kind of site ('attn', 'crossattn', 'mlp') -> the module
            that computes on tokens there.
        context_argument (str): name of the argument of its self-attention for
            tokens to take keys and values from.
        refused (dict): kind of site -> why tokens cannot be merged there.
    """

    name: str
    module: nn.Module
    stack: nn.Module
    downsample: int
    sites: dict[str, nn.Module] = field(default_factory=dict)
    context_argument: str = "encoder_hidden_states"
    refused: dict[str, str] = field(default_factory=dict)


class Host(Protocol):
    """Description of one model family. Stateless; its methods are called while the model runs.

    ``description`` is a short phrase for error messages.
    """

    description: str

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is a network of this family."""

    def blocks(self, network: nn.Module) -> list[Block]:
        """All blocks of the network in the order in which they run."""

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The timestep in a call of the network: a tensor, a number, or None."""

    def noise_level(self, timestep: float) -> float:
        """A timestep as a share of the training steps: 1 = pure noise, 0 = none."""

    def grid(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        """(height, width) in tokens, from the arguments of a call of a stack."""
