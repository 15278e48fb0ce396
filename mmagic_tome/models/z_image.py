# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Z-Image and Lumina 2 in diffusers: joint sequences, complex rotary embeddings.

Blocks receive tokens, a mask over them and a rotary table per batch entry. Z-Image's sequences
begin with the image tokens, then padding to a multiple of 32, then the text; Lumina 2's begin with
the text, whose length differs between prompts. Both count timesteps upwards: 0 is pure noise.

Blocks: ``noise_refiner`` (image tokens only) and ``layers``. Targets: ``attn`` = Z-Image's
``attention``, Lumina 2's ``attn``, ``mlp`` = ``feed_forward``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import argument
from .transformer import TABLE_OF_ALL, RotaryTransformer

_COMMON = dict(
    mlp="feed_forward",
    image_keys="first",
    refused={"stack": TABLE_OF_ALL},
)
_JOINT = dict(_COMMON, joint_sequence=("attn", "mlp", "block"))


class _JointSequence(RotaryTransformer):
    takes_masks = True
    mask_position = 1
    table_position = 2
    timestep_position = 1
    timestep_scale = 1.0

    def timestep(self, args: tuple, kwargs: dict) -> Any:
        # Inverted, so that it falls along a run. Rounded, since 1 - 0.9 is slightly more than 0.1
        # and runs are recognized by their timesteps.
        timestep = super().timestep(args, kwargs)
        if isinstance(timestep, Tensor):
            return (1 - timestep.float()).round(decimals=6)
        return None if timestep is None else round(1 - timestep, 6)


class ZImage(_JointSequence):
    description = "Z-Image (ZImageTransformer2DModel)"
    class_names = ("ZImageTransformer2DModel",)
    timestep_name = "t"
    image_first = True
    lists = (
        # Its sequences contain padding, which counts as text.
        ("noise_refiner", dict(_JOINT, attn="attention")),
        ("layers", dict(_JOINT, attn="attention")),
    )

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
        images = argument(args, kwargs, 0, "x")
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
        patch = argument(args, kwargs, 7, "patch_size", 2)
        patch_frames = argument(args, kwargs, 8, "f_patch_size", 1)
        return (frames // patch_frames) * (height // patch), width // patch


class Lumina2(_JointSequence):
    description = "Lumina 2 (Lumina2Transformer2DModel)"
    class_names = ("Lumina2Transformer2DModel",)
    lists = (("noise_refiner", _COMMON), ("layers", _JOINT))

    def num_text_tokens_before(self, args: tuple, kwargs: dict) -> list[int]:
        # This synchronizes with the device, as the network itself does.
        return argument(args, kwargs, 3, "encoder_attention_mask").sum(dim=1).tolist()

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        tokens = kwargs.get("encoder_hidden_states")
        if tokens is not None:  # attention receives its own input again, for keys and values
            kwargs = {**kwargs, "encoder_hidden_states": plan.merge(tokens)}
        return super().adapt(target, plan, args, kwargs)
