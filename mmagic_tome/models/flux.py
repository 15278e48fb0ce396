# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Flux.1, Flux.2 and what is built like them in diffusers: Chroma, Bria, LongCat-Image, Ovis-Image.

There are double blocks (two streams), single blocks (one) and rotary embeddings (:mod:`.rotary`).
Double blocks are as those of Stable Diffusion 3. Single blocks work on the text in front of the
picture; most are called with both apart and put them together inside, those of Flux.2 and Chroma
are called with one sequence. What is wrapped leaves the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ToMeError
from .base import Block, Host
from .dit import is_a
from .rotary import merge_mask, with_merged_rotary
from .sd3 import REFUSED


class Flux(Host):
    """Host for ``FluxTransformer2DModel``.

    Sites of double blocks: ``attn`` = ``attn``, ``mlp`` = ``ff`` (the picture's). Of single
    blocks: ``attn`` = ``attn``, ``mlp`` = ``proj_mlp`` and ``act_mlp``; the projection back is
    shared by both and runs on all tokens. To merge it as well, write ``sites='block'``.

    The grid is read from ``img_ids``, once for every tensor that is given as such: that is one
    wait for the device per picture, as pipelines make the tensor before the first step. A graph
    of the whole network (``torch.compile(fullgraph=True)``) cannot do that; compile the blocks
    (``compile_repeated_blocks``) instead, or allow graph breaks.
    """

    description = "Flux.1 (FluxTransformer2DModel)"
    class_name = "FluxTransformer2DModel"
    timestep_position = 3
    ids_position = 4

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, self.class_name)

    def blocks(self, network: nn.Module) -> list[Block]:
        double = [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn, "mlp": block.ff},
                returns={"block": 1},
                joint=("attn", "block"),
                refused=REFUSED,
            )
            for index, block in enumerate(network.transformer_blocks)
        ]
        return [*double, *self._single(network)]

    def _single(self, network: nn.Module) -> Iterator[Block]:
        for index, block in enumerate(network.single_transformer_blocks):
            yield Block(
                name=f"single_transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"mlp": [block.proj_mlp, block.act_mlp], "attn": block.attn},
                text_beside=("attn", "mlp"),
                returns={"block": 1},
                joint=("attn", "block"),
                refused=REFUSED,
            )

    def noise_level(self, timestep: float) -> float:
        # Pipelines divide by 1000 before the call.
        return timestep

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        position = self.ids_position
        return grid_of_ids(args[position] if len(args) > position else kwargs["img_ids"])

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("attention_mask") is not None:
            raise ToMeError(
                f"{site} was given an attention_mask over all tokens, which has no meaning for "
                "merged ones; call the model without it"
            )
        return _adapted(site, plan, args, kwargs)


class Chroma(Flux):
    """Host for ``ChromaTransformer2DModel``. Sites: as :class:`Flux`.

    Its pipelines always give a mask, which leaves out some of the text's padding.
    """

    description = "Chroma (ChromaTransformer2DModel)"
    class_name = "ChromaTransformer2DModel"
    timestep_position = 2
    ids_position = 3
    takes_masks = True

    def _single(self, network: nn.Module) -> Iterator[Block]:
        for index, block in enumerate(network.single_transformer_blocks):
            yield Block(
                name=f"single_transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"mlp": [block.proj_mlp, block.act_mlp], "attn": block.attn},
                text_beside=("attn", "mlp", "block"),
                joint=("attn", "block"),
                refused=REFUSED,
            )

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": merge_mask(mask, plan)}
        elif len(args) > 4 and args[4] is not None:  # a double block under gradient checkpointing
            args = (*args[:4], merge_mask(args[4], plan), *args[5:])
        return _adapted(site, plan, args, kwargs)


class Flux2(Flux):
    """Host for ``Flux2Transformer2DModel``.

    Sites of double blocks: as :class:`Flux`. Of single blocks: ``attn`` = ``attn``, which has the
    feed-forward inside, beside attention, so that both are merged there.
    """

    description = "Flux.2 (Flux2Transformer2DModel)"
    class_name = "Flux2Transformer2DModel"
    timestep_position = 2
    ids_position = 3

    def _single(self, network: nn.Module) -> Iterator[Block]:
        for index, block in enumerate(network.single_transformer_blocks):
            yield Block(
                name=f"single_transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn},
                text_beside=("attn", "block"),
                joint=("attn", "block"),
                refused=REFUSED,
            )

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        inner = kwargs.get("joint_attention_kwargs") or {}
        if kwargs.get("kv_cache_mode") or inner.get("kv_cache_mode"):
            raise ToMeError(
                f"{site} keeps keys and values of reference pictures by their places "
                "(kv_cache_mode), which merged tokens have not; call the model without it"
            )
        return super().adapt(site, plan, args, kwargs)


class Bria(Flux):
    """Host for ``BriaTransformer2DModel``. Sites: as :class:`Flux`."""

    description = "Bria (BriaTransformer2DModel)"
    class_name = "BriaTransformer2DModel"

    def noise_level(self, timestep: float) -> float:
        return timestep / 1000


class LongCatImage(Flux):
    """Host for ``LongCatImageTransformer2DModel``. Sites: as :class:`Flux`."""

    description = "LongCat-Image (LongCatImageTransformer2DModel)"
    class_name = "LongCatImageTransformer2DModel"
    timestep_position = 2
    ids_position = 3


class OvisImage(LongCatImage):
    """Host for ``OvisImageTransformer2DModel``.

    Sites: as :class:`Flux`, but the feed-forward of single blocks halves what ``proj_mlp`` gives
    before it goes on, so that ``mlp`` ends there.
    """

    description = "Ovis-Image (OvisImageTransformer2DModel)"
    class_name = "OvisImageTransformer2DModel"

    def _single(self, network: nn.Module) -> Iterator[Block]:
        for block in super()._single(network):
            yield replace(block, sites={**block.sites, "mlp": block.module.proj_mlp})


def _adapted(
    site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    if kwargs.get("ip_hidden_states") is not None and "encoder_hidden_states" in kwargs:
        raise ToMeError(
            f"{site} returns what an IP-Adapter adds apart from its output; with one write "
            "sites='block' or sites=['mlp']"
        )
    return with_merged_rotary(plan, args, kwargs)


# --- the grid -------------------------------------------------------------------------------------

_known_grids = WeakTensorKeyDictionary()


@_disable_dynamo  # torch.compiler.disable, which would import the compiler now
def grid_of_ids(ids: Tensor) -> tuple[int, int]:
    """(height, width) in tokens from position ids, remembered as long as the tensor lives.

    Args:
        ids (Tensor): (N, 3) or (B, N, 3): picture, row and column of every token.

    Raises:
        ToMeError: the tokens are not those of one picture, row by row (as with reference
            pictures in the same sequence).
    """
    version = None if ids.is_inference() else ids._version
    known = _known_grids.get(ids)
    if known is None or known[0] != version:
        known = _known_grids[ids] = (version, _read_grid(ids))
    return known[1]


def _read_grid(ids: Tensor) -> tuple[int, int]:
    # By how they repeat, not by the largest: half precision does not hold all integers.
    places = (ids[0] if ids.dim() == 3 else ids).detach().float().cpu()
    tokens = places.shape[0]
    changes = (places[:, 1] != places[0, 1]).nonzero()
    width = int(changes[0]) if len(changes) else tokens
    if tokens % width == 0:
        rows = places.view(-1, width, places.shape[1])
        same_picture = (rows[..., 0] == places[0, 0]).all()
        if same_picture and (rows[..., 1] == rows[:, :1, 1]).all():
            falls = (rows[1:, 0, 1] < rows[:-1, 0, 1]).any()
            if not falls and (rows[..., 2] == rows[:1, :, 2]).all():
                return rows.shape[0], width
    raise ToMeError(
        f"the {tokens} tokens of img_ids are not one picture row by row (reference pictures in the "
        "same sequence?), so they lie on no grid to merge on; call the model without token merging"
    )
