# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What adapters of diffusion transformers share: lists of blocks, patch grids, merged positions.

A rotary table holds a row of cosines and a row of sines (or a row of complex numbers) per token.
A merged token takes the row of its destination (``plan.representative``). Averaging rotations does
not give a rotation: the norm drops below 1 and shrinks the attention logits. Masks are indexed the
same way; they only mask text, so the row of any image token will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ToMeError
from ..merging.joint import joint_plan
from .base import Block, ModelAdapter, blocks_of

TABLE_OF_ALL = "every block receives the rotary table of all tokens. Write targets='block'"

# Arguments of blocks_of. Attributes of diffusers' BasicTransformerBlock:
BASIC = dict(attn="attn1", crossattn="attn2", mlp="ff")
# Blocks with one stream and rotary embeddings:
ROTARY = dict(
    BASIC,
    image_keys="first",
    refused={"stack": TABLE_OF_ALL},
)
# Blocks with joint attention of image and text tokens:
JOINT = dict(
    image_keys="last",
    refused={
        "stack": "text tokens pass from block to block as well. Write targets='block'",
    },
)
# Those of them that return (text, image):
TEXT_FIRST = dict(JOINT, output_index={"block": 1})
# Names of the rotary table among the keyword arguments of blocks and attention.
_TABLE_NAMES = ("image_rotary_emb", "rotary_emb", "freqs_cis")
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
        """Of a (B, C, h, w) latent, or of a video's, whose frames are stacked vertically: a token
        merges into the most similar destination of all frames."""
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
        table_position: index of the rotary table among a block's positional arguments. Default
            None: that of any tuple (of cosines and sines).
        mask_position: index of ``attention_mask`` there. Default None: masks are not merged.
        image_first: whether image tokens precede all other tokens. Default False.
    """

    table_position: int | None = None
    mask_position: int | None = None
    image_first: bool = False

    def num_text_tokens_before(self, args: tuple, kwargs: dict) -> int | list[int] | None:
        return 0 if self.image_first else None

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        changed = {}
        before = 0 if self.image_first else None
        for position, value in enumerate(args):
            if position == self.mask_position and value is not None:
                changed[position] = merge_mask(value, plan, before)
            elif position == self.table_position or isinstance(value, tuple):
                changed[position] = self.merged_table(value, plan)
        if changed:
            args = tuple(changed.get(position, value) for position, value in enumerate(args))
        if self.mask_position is not None and kwargs.get("attention_mask") is not None:
            kwargs = {
                **kwargs,
                "attention_mask": merge_mask(kwargs["attention_mask"], plan, before),
            }
        for name in _TABLE_NAMES:
            if kwargs.get(name) is not None:
                kwargs = {**kwargs, name: self.merged_table(kwargs[name], plan)}
        return args, kwargs

    def merged_table(self, table: Any, plan: Any) -> Any:
        return merge_rotary(table, plan)


def merge_rotary(table: Tensor | tuple[Tensor, ...], plan: Any) -> Any:
    """Return the rows of the representatives of merged tokens: S' rows, and for (S, D) and a batch
    B > 1 :class:`RotaryRows`.

    Args:
        table: complex rows, or a tuple of cosines and sines; each (S, D), (B, S, D) or
            (1, S, 1, D). Where S exceeds the plan's number of tokens, the first rows are those of
            the text, which are kept.
        plan (MergePlan): for B batch entries.
    """
    if isinstance(table, Tensor):
        return _merged_rows(table, plan)
    return tuple(_merged_rows(part, plan) for part in table)


def merge_mask(mask: Tensor, plan: Any, num_before: int | None = None) -> Tensor:
    """Return a mask over keys, or over queries and keys, for merged tokens: S' in place of S.

    Args:
        mask: (B, S), (B, 1, 1, S) or (B, 1, S, S); S exceeds the plan's number of tokens by that
            of the text tokens.
        plan (MergePlan): for B batch entries.
        num_before: how many text tokens precede the image tokens. Default None: all.
    """
    length = mask.shape[-1]
    kept = joint_plan(plan, length, num_before).representative
    square = mask.dim() > 2 and mask.shape[-2] == length
    kept = kept.view(kept.shape[0], *[1] * (mask.dim() - 2), -1)
    mask = torch.take_along_dim(mask, kept, dim=-1)
    return torch.take_along_dim(mask, kept.transpose(-1, -2), dim=-2) if square else mask


class RotaryRows:
    """A rotary table (B, S, D) with different rows per batch entry.

    Attention expects one (S, D) table for the whole batch and adds axes for batch and heads:
    ``table[None, :, None, :]``, ``table[None, None]`` or ``table.unsqueeze(1)``. This object
    supports the same expressions and puts its batch in place of the new first axis.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: tuple) -> Tensor:
        if not isinstance(index, tuple) or index[0] is not None:
            self._refuse(repr(index))
        return self.rows[(slice(None), *index[1:])]

    def unsqueeze(self, dim: int) -> Tensor:
        """Return (B, S, 1, D), which broadcasts with (B, S, heads, D) as (S, 1, D) does."""
        if dim != 1:
            self._refuse(f"unsqueeze({dim})")
        return self.rows.unsqueeze(2)

    def _refuse(self, what: str) -> None:
        raise ToMeError(
            f"this attention processor indexes its rotary table by {what}, which is not supported "
            "with merged tokens; use the default processor, or a batch of 1"
        )


def _merged_rows(part: Tensor, plan: Any) -> Tensor | RotaryRows:
    batched = part.dim() > 2
    kept = joint_plan(plan, part.shape[1 if batched else 0]).representative
    if not batched:
        return part[kept[0]] if kept.shape[0] == 1 else RotaryRows(part[kept])
    if part.shape[0] == 1:
        return part[0][kept]
    return torch.take_along_dim(part, kept[..., None], dim=1)
