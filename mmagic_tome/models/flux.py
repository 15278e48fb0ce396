# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Flux.1, Flux.2 and their relatives in diffusers: Chroma, Bria, LongCat-Image, Ovis-Image.

Double blocks have two streams, single blocks one; both use rotary embeddings (:mod:`.rotary`).
Double blocks are like those of Stable Diffusion 3. Single blocks run on a joint sequence, text
first: most receive text and image tokens separately and concatenate them inside, those of Flux.2
and Chroma receive the joint sequence.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ToMeError
from .base import Block, ModelAdapter, blocks_of
from .position_ids import grid_of_ids
from .rotary import merge_mask, with_merged_rotary
from .sd3 import REFUSED

# Arguments of blocks_of for single blocks.
_SINGLE = dict(
    mlp=("proj_mlp", "act_mlp"),
    mlp_first=True,
    joint_sequence=("attn", "mlp"),
    output_index={"block": 1},
)
_SINGLE_CHROMA = dict(_SINGLE, joint_sequence=("attn", "mlp", "block"), output_index={})
_SINGLE_FLUX2 = dict(mlp=None, joint_sequence=("attn", "block"))
_SINGLE_OVIS = dict(_SINGLE, mlp="proj_mlp")


class Flux(ModelAdapter):
    """``FluxTransformer2DModel``.

    Targets of double blocks: ``attn`` = ``attn``, ``mlp`` = ``ff`` (the image stream's). Of single
    blocks: ``attn`` = ``attn``, ``mlp`` = ``proj_mlp`` and ``act_mlp``; both share one output
    projection, which runs on all tokens. To merge it as well, write ``targets='block'``.

    The grid is read from ``img_ids`` (:mod:`.position_ids`), which synchronizes with the device
    once per image. A graph of the whole network (``torch.compile(fullgraph=True)``) cannot do
    that; compile the blocks (``compile_repeated_blocks``) or allow graph breaks.
    """

    description = "Flux.1 (FluxTransformer2DModel)"
    class_names = ("FluxTransformer2DModel",)
    timestep_position = 3
    timestep_scale = 1.0
    ids_position = 4
    single_blocks = _SINGLE

    def blocks(self, network: nn.Module) -> list[Block]:
        both = dict(joint=("attn", "block"), refused=REFUSED)
        double = blocks_of(network, "transformer_blocks", output_index={"block": 1}, **both)
        single = blocks_of(network, "single_transformer_blocks", **self.single_blocks, **both)
        return double + single

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        position = self.ids_position
        return grid_of_ids(args[position] if len(args) > position else kwargs["img_ids"])

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("attention_mask") is not None:
            raise ToMeError(
                f"{target} received an attention_mask over all tokens, which does not fit merged "
                "tokens; call the model without it"
            )
        check_ip_adapter(target, kwargs)
        return with_merged_rotary(plan, args, kwargs)


class Chroma(Flux):
    """``ChromaTransformer2DModel``. Targets: as :class:`Flux`.

    Its pipelines always pass a mask, which excludes some of the text's padding.
    """

    description = "Chroma (ChromaTransformer2DModel)"
    class_names = ("ChromaTransformer2DModel",)
    timestep_position = 2
    ids_position = 3
    takes_masks = True
    single_blocks = _SINGLE_CHROMA

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": merge_mask(mask, plan)}
        elif len(args) > 4 and args[4] is not None:  # a double block under gradient checkpointing
            args = (*args[:4], merge_mask(args[4], plan), *args[5:])
        check_ip_adapter(target, kwargs)
        return with_merged_rotary(plan, args, kwargs)


class Flux2(Flux):
    """``Flux2Transformer2DModel``.

    Targets of double blocks: as :class:`Flux`. Of single blocks: ``attn`` = ``attn``, which
    computes attention and feed-forward in parallel, so that both are merged.
    """

    description = "Flux.2 (Flux2Transformer2DModel)"
    class_names = ("Flux2Transformer2DModel",)
    timestep_position = 2
    ids_position = 3
    single_blocks = _SINGLE_FLUX2

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        inner = kwargs.get("joint_attention_kwargs") or {}
        if kwargs.get("kv_cache_mode") or inner.get("kv_cache_mode"):
            raise ToMeError(
                f"{target} caches keys and values of reference images by position "
                "(kv_cache_mode), which merged tokens do not have; call the model without it"
            )
        return super().adapt(target, plan, args, kwargs)


class Bria(Flux):
    """``BriaTransformer2DModel``. Targets: as :class:`Flux`."""

    description = "Bria (BriaTransformer2DModel)"
    class_names = ("BriaTransformer2DModel",)
    timestep_scale = 1000.0


class LongCatImage(Flux):
    """``LongCatImageTransformer2DModel``. Targets: as :class:`Flux`."""

    description = "LongCat-Image (LongCatImageTransformer2DModel)"
    class_names = ("LongCatImageTransformer2DModel",)
    timestep_position = 2
    ids_position = 3


class OvisImage(LongCatImage):
    """``OvisImageTransformer2DModel``.

    Targets: as :class:`Flux`, but ``mlp`` of single blocks is ``proj_mlp`` alone: its output is
    split in two halves before the activation.
    """

    description = "Ovis-Image (OvisImageTransformer2DModel)"
    class_names = ("OvisImageTransformer2DModel",)
    single_blocks = _SINGLE_OVIS


def check_ip_adapter(target: str, kwargs: dict[str, Any]) -> None:
    """Raise ToMeError if an attention is called with an IP-Adapter's image prompt."""
    if kwargs.get("ip_hidden_states") is not None and "encoder_hidden_states" in kwargs:
        raise ToMeError(
            f"{target} returns the IP-Adapter's output separately, which cannot be unmerged; with "
            "an IP-Adapter write targets='block' or targets=['mlp']"
        )
