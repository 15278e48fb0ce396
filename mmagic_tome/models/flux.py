# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Flux.1, Flux.2 and their relatives in diffusers: Chroma, Bria, LongCat-Image, Ovis-Image,
HunyuanVideo.

Double blocks are like those of Stable Diffusion 3. Single blocks run on a joint sequence, text
first: most receive text and image tokens separately and concatenate them inside, those of Flux.2
and Chroma receive the joint sequence. Both use rotary embeddings.

Targets of double blocks: ``attn`` = ``attn``, ``mlp`` = ``ff`` (the image stream's). Of single
blocks: ``attn`` = ``attn``, ``mlp`` = ``proj_mlp`` and ``act_mlp``; both share one output
projection, which runs on all tokens. To merge it as well, write ``targets='block'``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ToMeError
from .base import Block, argument
from .transformer import JOINT, MLP_FIRST, TEXT_FIRST, RotaryTransformer

_DOUBLE = ("transformer_blocks", TEXT_FIRST)
_SINGLE = dict(TEXT_FIRST, **MLP_FIRST, joint_sequence=("attn", "mlp"))
_SINGLE_CHROMA = dict(JOINT, **MLP_FIRST, joint_sequence=("attn", "mlp", "block"))
_SINGLE_FLUX2 = dict(JOINT, mlp=None, joint_sequence=("attn", "block"))
_VIDEO = dict(JOINT, image_keys="first")

# Ids tensor -> (version, grid). Pipelines build the tensor once per image, so the grid is read,
# which synchronizes with the device, once per image instead of at every step.
_known_grids = WeakTensorKeyDictionary()


class Flux(RotaryTransformer):
    """A graph of the whole network (``torch.compile(fullgraph=True)``) cannot read the grid from
    ``img_ids``; compile the blocks (``compile_repeated_blocks``) or allow graph breaks."""

    description = "Flux.1 (FluxTransformer2DModel)"
    class_names = ("FluxTransformer2DModel",)
    timestep_position = 3
    timestep_scale = 1.0
    lists = (_DOUBLE, ("single_transformer_blocks", _SINGLE))

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
        return grid_of_ids(argument(args, kwargs, self.timestep_position + 1, "img_ids"))

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not self.takes_masks and kwargs.get("attention_mask") is not None:
            raise ToMeError(
                f"{target} received an attention_mask over all tokens, which does not fit merged "
                "tokens; call the model without it"
            )
        if kwargs.get("ip_hidden_states") is not None and "encoder_hidden_states" in kwargs:
            raise ToMeError(
                f"{target} returns the IP-Adapter's output separately, which cannot be unmerged; "
                "with an IP-Adapter write targets='attn_kv' or targets='block'"
            )
        return super().adapt(target, plan, args, kwargs)


class Bria(Flux):
    description = "Bria (BriaTransformer2DModel)"
    class_names = ("BriaTransformer2DModel",)
    timestep_scale = 1000.0


class LongCatImage(Flux):
    description = "LongCat-Image (LongCatImageTransformer2DModel)"
    class_names = ("LongCatImageTransformer2DModel",)
    timestep_position = 2


class OvisImage(LongCatImage):
    """``mlp`` of single blocks is ``proj_mlp`` alone: its output is split before the activation."""

    description = "Ovis-Image (OvisImageTransformer2DModel)"
    class_names = ("OvisImageTransformer2DModel",)
    lists = (_DOUBLE, ("single_transformer_blocks", dict(_SINGLE, mlp="proj_mlp")))


class Chroma(Flux):
    description = "Chroma (ChromaTransformer2DModel)"
    class_names = ("ChromaTransformer2DModel",)
    timestep_position = 2
    takes_masks = True
    mask_position = 4  # of a double block under gradient checkpointing
    lists = (_DOUBLE, ("single_transformer_blocks", _SINGLE_CHROMA))


class Flux2(Flux):
    """``attn`` of single blocks computes the feed-forward too, so both are merged together."""

    description = "Flux.2 (Flux2Transformer2DModel)"
    class_names = ("Flux2Transformer2DModel",)
    timestep_position = 2
    lists = (_DOUBLE, ("single_transformer_blocks", _SINGLE_FLUX2))

    def check(self, target: str, args: tuple, kwargs: dict) -> None:
        inner = kwargs.get("joint_attention_kwargs") or {}
        if kwargs.get("kv_cache_mode") or inner.get("kv_cache_mode"):
            raise ToMeError(
                f"{target} caches keys and values of reference images by position "
                "(kv_cache_mode), which merged tokens do not have; call the model without it"
            )


class HunyuanVideo(RotaryTransformer):
    """Video. The text follows the image tokens, and a mask excludes its padding."""

    description = "HunyuanVideo (HunyuanVideoTransformer3DModel)"
    class_names = ("HunyuanVideoTransformer3DModel",)
    timestep_position = 1
    takes_masks = True
    mask_position = 3
    image_first = True
    lists = (
        ("transformer_blocks", _VIDEO),
        ("single_transformer_blocks", dict(_VIDEO, **MLP_FIRST, joint_sequence=("mlp",))),
    )

    def blocks(self, network: nn.Module) -> list[Block]:
        blocks = super().blocks(network)
        if network.config.image_condition_type != "token_replace":
            return blocks
        refused = dict(
            JOINT["refused"],
            block="the tokens of the first frame have their own timestep, which does not fit "
            "merged tokens. Write targets=['attn', 'mlp']",
        )
        return [replace(block, refused=refused) for block in blocks]


@_disable_dynamo  # as torch.compiler.disable, without importing the compiler now
def grid_of_ids(ids: Tensor) -> tuple[int, int]:
    """Return (height, width) in tokens from ids (N, 3+) or (B, N, 3+): index of the image, row and
    column of every token; cached as long as the tensor lives unchanged. ToMeError: the tokens are
    not those of one image, row by row (as with reference images in the same sequence)."""
    version = None if ids.is_inference() else ids._version
    known = _known_grids.get(ids)
    if known is None or known[0] != version:
        known = _known_grids[ids] = (version, _read_grid(ids))
    return known[1]


def _read_grid(ids: Tensor) -> tuple[int, int]:
    # From the period of the rows, not from the largest id: half precision rounds large integers.
    positions = (ids[0] if ids.dim() == 3 else ids).detach().float().cpu()
    tokens = positions.shape[0]
    changes = (positions[:, 1] != positions[0, 1]).nonzero()
    width = int(changes[0]) if len(changes) else tokens
    if tokens % width == 0:
        image, row, column = positions.view(-1, width, positions.shape[1]).unbind(-1)[:3]
        one_image = (image == image[0, 0]).all() and (row[1:, 0] >= row[:-1, 0]).all()
        if one_image and (row == row[:, :1]).all() and (column == column[:1]).all():
            return row.shape[0], width
    raise ToMeError(
        f"the {tokens} tokens of img_ids are not one image row by row (reference images in the "
        "same sequence?), so there is no grid to merge on; call the model without token merging"
    )
