# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Z-Image and Lumina 2 in diffusers: joint sequences, complex rotary embeddings.

Blocks receive tokens, a mask over them and a rotary table per batch entry. Z-Image's sequences
begin with the image tokens, then padding to a multiple of 32, then the text; Lumina 2's begin with
the text, whose length differs between prompts. Both count timesteps upwards: 0 is pure noise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import Block, ModelAdapter, blocks_of
from .dit import PatchTransformer
from .rotary import merge_mask, with_merged_rotary

# Positions of the mask and the table among the arguments of a block.
_MASK, _TABLE = 1, 2
_REFUSED = {
    "attn_kv": (
        "queries, keys and values are projected from the same tokens. Use targets=['attn'] and a "
        "method that merges queries too, such as 'tome'"
    ),
    "stack": "every block receives the rotary table of all tokens. Write targets='block'",
}
_TEXT = dict(joint_sequence=("attn", "mlp", "block"))
_JOINT = dict(**_TEXT, joint=("attn", "block"))


class _JointSequence(ModelAdapter):
    """Common to both."""

    takes_masks = True
    timestep_scale = 1.0

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        # Inverted, so that it falls along a run. Rounded, since 1 - 0.9 is slightly more than 0.1
        # and runs are recognized by their timesteps.
        timestep = super().timestep(args, kwargs)
        if isinstance(timestep, Tensor):
            return (1 - timestep.float()).round(decimals=6)
        return None if timestep is None else round(1 - timestep, 6)

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if len(args) > _MASK and args[_MASK] is not None:
            args = (args[0], merge_mask(args[_MASK], plan), *args[_MASK + 1 :])
        elif kwargs.get("attention_mask") is not None:
            mask = merge_mask(kwargs["attention_mask"], plan)
            kwargs = {**kwargs, "attention_mask": mask}
        return with_merged_rotary(plan, args, kwargs, position=_TABLE)


class ZImage(_JointSequence):
    """``ZImageTransformer2DModel``.

    Blocks: ``noise_refiner`` (image tokens only) and ``layers``. Targets: ``attn`` =
    ``attention``, ``mlp`` = ``feed_forward``. All images of a batch have one size.
    """

    description = "Z-Image (ZImageTransformer2DModel)"
    class_names = ("ZImageTransformer2DModel",)
    timestep_position = 1
    timestep_name = "t"

    def blocks(self, network: nn.Module) -> list[Block]:
        common = dict(attn="attention", mlp="feed_forward", refused=_REFUSED)
        # The refiner's sequences contain padding, hence its joint_sequence.
        return [
            *blocks_of(network, "noise_refiner", **common, **_TEXT),
            *blocks_of(network, "layers", **common, **_JOINT),
        ]

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        images = args[0] if args else kwargs["x"]
        if isinstance(images[0], list):
            raise ToMeError(
                "Z-Image was called with several images in one sequence (x is a list of lists), "
                "so there is no single grid to merge on; call the model without token merging"
            )
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            raise ToMeError(
                f"Z-Image was called with images of {len(sizes)} sizes in one batch; with token "
                "merging, call it with one size at a time"
            )
        frames, height, width = sizes.pop()
        patch = args[7] if len(args) > 7 else kwargs.get("patch_size", 2)
        patch_frames = args[8] if len(args) > 8 else kwargs.get("f_patch_size", 1)
        return (frames // patch_frames) * (height // patch), width // patch

    def num_text_tokens_before(self, args: tuple, kwargs: dict[str, Any]) -> int:
        return 0


class Lumina2(_JointSequence):
    """``Lumina2Transformer2DModel``.

    Blocks: ``noise_refiner`` (image tokens only) and ``layers``. Targets: ``attn`` = ``attn``,
    ``mlp`` = ``feed_forward``. The number of text tokens is counted from the text's mask, which
    synchronizes with the device, as the network itself does.
    """

    description = "Lumina 2 (Lumina2Transformer2DModel)"
    class_names = ("Lumina2Transformer2DModel",)
    timestep_position = 1

    def blocks(self, network: nn.Module) -> list[Block]:
        common = dict(mlp="feed_forward", refused=_REFUSED)
        return [
            *blocks_of(network, "noise_refiner", **common),
            *blocks_of(network, "layers", **common, **_JOINT),
        ]

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        return PatchTransformer().grid(grid_module, args, kwargs)

    def num_text_tokens_before(self, args: tuple, kwargs: dict[str, Any]) -> list[int]:
        mask = args[3] if len(args) > 3 else kwargs["encoder_attention_mask"]
        return mask.sum(dim=1).tolist()

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        tokens = kwargs.get("encoder_hidden_states")
        if tokens is not None:  # attention receives its own input again, for keys and values
            kwargs = {**kwargs, "encoder_hidden_states": plan.merge(tokens)}
        return super().adapt(target, plan, args, kwargs)
