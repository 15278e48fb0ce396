# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What adapters of diffusion transformers share: lists of blocks, patch grids, merged positions."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Block, ModelAdapter, blocks_of, with_changed
from .rotary import merge_mask, with_merged_rotary

_OTHER_METHOD = "Use targets=['attn'] and a method that merges queries too, such as 'tome'"
SAME_TOKENS = f"queries, keys and values are projected from the same tokens. {_OTHER_METHOD}"
TABLE_OF_ALL = "every block receives the rotary table of all tokens. Write targets='block'"

# Arguments of blocks_of. Attributes of diffusers' BasicTransformerBlock:
BASIC = dict(attn="attn1", crossattn="attn2", mlp="ff")
# Blocks with one stream and rotary embeddings:
_ONE_TABLE = "queries and keys share one rotary table, so they must be the same tokens. "
ROTARY = dict(BASIC, refused={"attn_kv": _ONE_TABLE + _OTHER_METHOD, "stack": TABLE_OF_ALL})
# Blocks with joint attention of image and text tokens:
JOINT = dict(
    joint=("attn", "block"),
    refused={
        "attn_kv": SAME_TOKENS,
        "stack": "text tokens pass from block to block as well. Write targets='block'",
    },
)
# Those of them that return (text, image):
TEXT_FIRST = dict(JOINT, output_index={"block": 1})
# Single blocks of Flux' kind, which compute the feed-forward before attention:
MLP_FIRST = dict(mlp=("proj_mlp", "act_mlp"), mlp_first=True)


class Transformer(ModelAdapter):
    """A diffusion transformer over the patches of a latent. All blocks share the patch grid.

    Attributes:
        lists: dotted paths of lists of blocks, with arguments of :func:`blocks_of`, in running
            order.
        frames_axis: of a video's latent. Default 2: (B, C, F, h, w).
    """

    lists: tuple[tuple[str, dict[str, Any]], ...]
    frames_axis: int = 2

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            block for name, options in self.lists for block in blocks_of(network, name, **options)
        ]

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
        """Of a (B, C, h, w) latent, or of a video's, whose frames are stacked vertically.

        So cells are squares of one frame (with an odd number of rows per frame, some span two),
        and a token merges into the most similar destination of all frames.
        """
        latent = args[0] if args else kwargs["hidden_states"]
        config = grid_module.config
        patch = config.patch_size
        if isinstance(patch, int):
            patch = (config.get("patch_size_t") or 1, patch, patch)
        frames = latent.shape[self.frames_axis] // patch[0] if latent.dim() == 5 else 1
        return frames * (latent.shape[-2] // patch[1]), latent.shape[-1] // patch[2]


class RotaryTransformer(Transformer):
    """A transformer whose blocks or attention receive rotary embeddings.

    Attributes:
        table_position: see :func:`.rotary.with_merged_rotary`.
        mask_position: index of ``attention_mask`` among a block's positional arguments. Default
            None: masks are not merged.
        image_first: whether image tokens precede all other tokens. Default False.
    """

    table_position: int | None = None
    mask_position: int | None = None
    image_first: bool = False

    def num_text_tokens_before(self, args: tuple, kwargs: dict) -> int | list[int] | None:
        return 0 if self.image_first else None

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.mask_position is not None:
            before = 0 if self.image_first else None
            args, kwargs = with_changed(
                args, kwargs, self.mask_position, "attention_mask", merge_mask, plan, before
            )
        return with_merged_rotary(plan, args, kwargs, self.table_position)
