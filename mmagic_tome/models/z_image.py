# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Z-Image and Lumina 2 in diffusers: text and picture in one sequence, complex rotary embeddings.

Blocks are called with tokens, a mask over them and the rotary table of every entry of the batch.
In Z-Image's sequences the picture is first, then what fills it up to a multiple of 32, then the
text; in Lumina 2's the text is first, as long as each prompt is, then the picture. Both know the
noise the other way round: their timestep is 0 for pure noise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import Block, Host
from .dit import PatchTransformer, is_a
from .rotary import merge_mask, with_merged_rotary

# Of blocks on one sequence; positions of the mask and the table among their arguments.
_MASK, _TABLE = 1, 2
_REFUSED = {
    "attn_kv": (
        "queries, keys and values are of the same tokens there. Use sites=['attn'] and a method "
        "that merges queries too, such as 'tome'"
    ),
    "stack": "every block is given the rotary table of all tokens. Write sites='block'",
}


class _OneSequence(Host):
    """What both have in common."""

    takes_masks = True

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        # From 1, pure noise, downwards, as runs are told apart by; rounded, since 1 - 0.9 is a
        # little more than 0.1 and the last step is known by its stride.
        timestep = super().timestep(args, kwargs)
        if isinstance(timestep, Tensor):
            return (1 - timestep.float()).round(decimals=6)
        return None if timestep is None else round(1 - timestep, 6)

    def noise_level(self, timestep: float) -> float:
        return timestep

    def _blocks(self, network: nn.Module, name: str, attention: str, **own: Any) -> list[Block]:
        return [
            Block(
                name=f"{name}.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": getattr(block, attention), "mlp": block.feed_forward},
                refused=_REFUSED,
                **own,
            )
            for index, block in enumerate(getattr(network, name))
        ]

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if len(args) > _MASK and args[_MASK] is not None:
            args = (args[0], merge_mask(args[_MASK], plan), *args[_MASK + 1 :])
        elif kwargs.get("attention_mask") is not None:
            mask = merge_mask(kwargs["attention_mask"], plan)
            kwargs = {**kwargs, "attention_mask": mask}
        return with_merged_rotary(plan, args, kwargs, position=_TABLE)


class ZImage(_OneSequence):
    """Host for ``ZImageTransformer2DModel``.

    Blocks: ``noise_refiner`` (the picture alone) and ``layers``. Sites: ``attn`` = ``attention``,
    ``mlp`` = ``feed_forward``. All pictures of a batch are of one size.
    """

    description = "Z-Image (ZImageTransformer2DModel)"
    timestep_position = 1
    timestep_name = "t"

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "ZImageTransformer2DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        text = ("attn", "mlp", "block")
        alone = self._blocks(network, "noise_refiner", "attention", text_beside=text)
        joint = ("attn", "block")
        joined = self._blocks(network, "layers", "attention", text_beside=text, joint=joint)
        return alone + joined

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        pictures = args[0] if args else kwargs["x"]
        if isinstance(pictures[0], list):
            raise ToMeError(
                "Z-Image was called with several pictures in one sequence (x is a list of lists), "
                "which lie on no one grid to merge on; call the model without token merging"
            )
        sizes = {tuple(picture.shape[1:]) for picture in pictures}
        if len(sizes) > 1:
            raise ToMeError(
                f"Z-Image was called with pictures of {len(sizes)} sizes at once; with token "
                "merging call it with one size at a time"
            )
        frames, height, width = sizes.pop()
        patch = args[7] if len(args) > 7 else kwargs.get("patch_size", 2)
        patch_frames = args[8] if len(args) > 8 else kwargs.get("f_patch_size", 1)
        return (frames // patch_frames) * (height // patch), width // patch

    def text_before(self, args: tuple, kwargs: dict[str, Any]) -> int:
        return 0


class Lumina2(_OneSequence):
    """Host for ``Lumina2Transformer2DModel``.

    Blocks: ``noise_refiner`` (the picture alone) and ``layers``. Sites: ``attn`` = ``attn``,
    ``mlp`` = ``feed_forward``. Where the picture begins is counted from the text's mask, which
    waits for the device, as the network does itself.
    """

    description = "Lumina 2 (Lumina2Transformer2DModel)"
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "Lumina2Transformer2DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        alone = self._blocks(network, "noise_refiner", "attn")
        text = dict(text_beside=("attn", "mlp", "block"), joint=("attn", "block"))
        return alone + self._blocks(network, "layers", "attn", **text)

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        return PatchTransformer().grid(stack, args, kwargs)

    def text_before(self, args: tuple, kwargs: dict[str, Any]) -> list[int]:
        mask = args[3] if len(args) > 3 else kwargs["encoder_attention_mask"]
        return mask.sum(dim=1).tolist()

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        tokens = kwargs.get("encoder_hidden_states")
        if tokens is not None:  # those of the queries once more, for keys and values
            kwargs = {**kwargs, "encoder_hidden_states": plan.merge(tokens)}
        return super().adapt(site, plan, args, kwargs)
