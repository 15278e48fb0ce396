# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Wan in diffusers: video, one stream with cross-attention, rotary embeddings.

Tokens lie on a grid of frames, rows and columns. Frames are stacked vertically, so that cells are
squares of one frame (with an odd number of rows per frame, some span two frames). A token merges
into the most similar destination of all frames.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import Block, ModelAdapter, blocks_of
from .rotary import with_merged_rotary

# For blocks with one stream and rotary embeddings, here and in other families.
REFUSED = {
    "attn_kv": (
        "queries and keys share one rotary table, so they must be the same tokens. Use "
        "targets=['attn'] and a method that merges queries too, such as 'tome'"
    ),
    "stack": "every block receives the rotary table of all tokens. Write targets='block'",
}
PER_TOKEN = (
    "received one timestep per token, which does not fit merged tokens; write "
    "targets=['attn', 'mlp']"
)


class Wan(ModelAdapter):
    """``WanTransformer3DModel`` and ``WanVACETransformer3DModel``, whose control branch is left
    unchanged.

    Targets: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ffn``.
    """

    description = "Wan (WanTransformer3DModel, WanVACETransformer3DModel)"
    class_names = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    timestep_position = 1

    def blocks(self, network: nn.Module) -> list[Block]:
        names = dict(attn="attn1", crossattn="attn2", mlp="ffn")
        return blocks_of(network, "blocks", **names, refused=REFUSED)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        frames, height, width = (
            size // patch for size, patch in zip(latent.shape[2:], grid_module.config.patch_size)
        )
        return frames * height, width

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        modulation = args[2] if len(args) > 2 else kwargs.get("temb")
        if isinstance(modulation, Tensor) and modulation.dim() == 4:
            raise ToMeError(f"{target} {PER_TOKEN}")
        return with_merged_rotary(plan, args, kwargs)


class SkyReelsV2(Wan):
    """``SkyReelsV2Transformer3DModel``. Targets: as :class:`Wan`."""

    description = "SkyReels V2 (SkyReelsV2Transformer3DModel)"
    class_names = ("SkyReelsV2Transformer3DModel",)

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        # Fifth argument of a block, third of its attention.
        position = {"block": 4, "attn": 2}.get(target.rpartition(".")[2])
        if position is not None and len(args) > position and args[position] is not None:
            raise ToMeError(
                f"{target} received a causal mask over frames (num_frame_per_block > 1), which "
                "does not fit tokens merged across frames; write targets=['crossattn', 'mlp']"
            )
        return super().adapt(target, plan, args, kwargs)
