# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Wan in diffusers: video, one stream with cross-attention, rotary embeddings.

Tokens lie on a grid of frames, rows and columns. Frames are put below each other, so that cells are
squares of one frame (where frames have an odd number of rows, some reach over into the next one);
which destination a token merges into is chosen among those of all frames.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import Block, Host
from .dit import is_a
from .rotary import with_merged_rotary

# Of blocks of one stream with rotary embeddings, here and in other families.
REFUSED = {
    "attn_kv": (
        "one rotary table turns queries and keys, which would no longer be the same tokens. Use "
        "sites=['attn'] and a method that merges queries too, such as 'tome'"
    ),
    "stack": "every block is given the rotary table of all tokens. Write sites='block'",
}


class Wan(Host):
    """Host for ``WanTransformer3DModel``, and ``WanVACETransformer3DModel``, whose control branch
    stays as it is.

    Sites: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ffn``.
    """

    description = "Wan (WanTransformer3DModel, WanVACETransformer3DModel)"
    class_names = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        return any(is_a(module, name) for name in self.class_names)

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn1, "crossattn": block.attn2, "mlp": block.ffn},
                refused=REFUSED,
            )
            for index, block in enumerate(network.blocks)
        ]

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        timestep = super().timestep(args, kwargs)
        if isinstance(timestep, Tensor) and timestep.dim() == 2:
            # One per token: those of a given first frame are 0 throughout, the last are not.
            return timestep[:, -1]
        return timestep

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        frames, height, width = (
            size // patch for size, patch in zip(latent.shape[2:], stack.config.patch_size)
        )
        return frames * height, width

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        modulation = args[2] if len(args) > 2 else kwargs.get("temb")
        if isinstance(modulation, Tensor) and modulation.dim() == 4:
            raise ToMeError(
                f"{site} is given a timestep per token, which does not fit merged tokens; write "
                "sites=['attn', 'mlp']"
            )
        return with_merged_rotary(plan, args, kwargs)


class SkyReelsV2(Wan):
    """Host for ``SkyReelsV2Transformer3DModel``. Sites: as :class:`Wan`."""

    description = "SkyReels V2 (SkyReelsV2Transformer3DModel)"
    class_names = ("SkyReelsV2Transformer3DModel",)

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        # Fifth argument of a block, third of its attention.
        position = {"block": 4, "attn": 2}.get(site.rpartition(".")[2])
        if position is not None and len(args) > position and args[position] is not None:
            raise ToMeError(
                f"{site} is given a causal mask over frames (num_frame_per_block > 1), which does "
                "not fit tokens that are merged across frames; write sites=['crossattn', 'mlp']"
            )
        return super().adapt(site, plan, args, kwargs)
