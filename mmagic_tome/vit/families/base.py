# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the hooks need to know of a vision transformer.

Unlike the adapters of diffusion models: no grid, timestep or resolution level, but the number of
protected tokens and where a block's queries, keys and values come from.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn

from ...errors import ToMeError


@dataclass(frozen=True)
class Heads:
    """Layout of the heads in a module's output: (B, N, parts * heads * dim), or (B, heads, N, C)
    where ``dim`` is 0."""

    dim: int  # channels of a head
    part: int = 0  # which part of a joint projection
    parts: int = 1


@dataclass(frozen=True)
class ViTBlock:
    """The modules of one block."""

    name: str  # dotted path in the model
    module: nn.Module  # the block, (B, N, C) -> (B, N, C)
    first: nn.Module  # its first norm, whose input is the block's
    attention: nn.Module  # whose call takes the attention mask
    output: nn.Module  # that returns the attention's output, projection included
    norm: nn.Module  # of the feed-forward; its input is merged
    last: nn.Module  # end of the feed-forward, before the residual addition
    sources: dict[str, tuple[nn.Module, Heads]]  # of 'queries', 'keys', 'values'
    hidden: int  # channels inside the feed-forward, as if it had two projections


@dataclass(frozen=True)
class ViT:
    """A vision transformer inside a model."""

    network: nn.Module  # whose call is a forward
    blocks: list[ViTBlock]  # in running order
    prefix: int  # protected tokens at the front: class, distillation, registers
    reads_all: bool  # whether what follows the blocks reads more than the protected tokens
    mask: str | None = None  # the attention's argument for an additive mask; None: it has none
    injection: type | None = None  # of mmagic_tome.vit.interface, where there is no such argument


class Family:
    """Vision transformers that are instances of one class."""

    description: str  # for messages
    library: str  # module that defines the class; where it is not imported, there is none
    network: str  # name of the class
    layers: str  # path of the list of blocks

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(path, module) of every one inside a model."""
        kind = getattr(sys.modules.get(self.library), self.network, None)
        if kind is None:
            return []
        return [(name, one) for name, one in model.named_modules() if isinstance(one, kind)]

    def describe(self, path: str, network: nn.Module, model: nn.Module) -> ViT:
        """What to hook in one at ``path`` of ``model``.

        Raises:
            ToMeError: blocks or a forward of another kind.
        """
        raise NotImplementedError

    def blocks(self, path: str, network: nn.Module) -> list[ViTBlock]:
        """The blocks of one at ``path``."""
        return [
            self.block(".".join(filter(None, (path, self.layers, str(index)))), layer)
            for index, layer in enumerate(network.get_submodule(self.layers))
        ]

    def block(self, name: str, layer: nn.Module) -> ViTBlock:
        """The modules of the block at ``name``."""
        raise NotImplementedError


def check_types(name: str, block: nn.Module, attention: object, *expected: type) -> None:
    """Raise :class:`ToMeError` if the classes of a block and its attention are not as expected."""
    found = (type(block), type(attention))
    if found != expected:
        wanted = " with ".join(kind.__name__ for kind in expected)
        raise ToMeError(
            f"{name} is a {' with '.join(kind.__name__ for kind in found)}; of this library only "
            f"{wanted} can be merged"
        )
