# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""UNets of diffusers: down, middle and up blocks with transformer stacks between convolutions.

Recognized by structure: modules with ``down_blocks`` and ``up_blocks`` (ControlNets:
``controlnet_down_blocks``) and stacks with ``transformer_blocks``. This covers all diffusers
versions and variants of ``BasicTransformerBlock`` (ada-norm, GLIGEN, IP-Adapter ...), since only
modules inside a block are hooked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .added_kv import added_kv_block, check_added_kv_call, is_added_kv
from .base import Block, ModelAdapter, blocks_of, is_a

# Stacks along frames (video UNets): their tokens lie on no image grid.
_TEMPORAL = {"temp_attentions", "motion_modules"}

# Attributes of a BasicTransformerBlock, by kind of target.
TARGETS = {"attn": "attn1", "crossattn": "attn2", "mlp": "ff"}


class DiffusersUNet(ModelAdapter):
    """``UNet2DConditionModel``, ``ControlNetModel`` and networks with their structure.

    Blocks: members of ``transformer_blocks`` that have ``attn1``, and attention over image-shaped
    tensors (:mod:`.added_kv`).
    Targets: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
    Grid: the last two sizes of the stack's (B, C, h, w) input.
    """

    context_argument = "encoder_hidden_states"
    description = (
        "diffusers UNets (UNet2DConditionModel and others with down_blocks and up_blocks) and "
        "ControlNets"
    )
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        # Own children only: wrappers (torch.compile's, MMagic's) pass attributes through, but
        # the network inside is what must be hooked.
        children = module._modules
        if "down_blocks" not in children:
            return False
        # Levels that are lists themselves (Stable Cascade's) are never called as modules.
        if any(isinstance(level, nn.ModuleList) for level in children["down_blocks"]):
            return False
        return "up_blocks" in children or "controlnet_down_blocks" in children

    def blocks(self, network: nn.Module) -> list[Block]:
        blocks = []
        for name, stack, downsample in _stacks(network):
            if is_added_kv(stack):
                blocks.append(added_kv_block(name, stack, downsample))
                continue
            members = blocks_of(
                network,
                f"{name}.transformer_blocks",
                stack,
                **TARGETS,
                downsample=downsample,
                context_argument=self.context_argument,
                mask_argument=mask_argument(stack.transformer_blocks),
                refused=_refused(stack),
            )
            blocks += [block for block in members if "attn" in block.targets]
        return blocks

    def inner_modules(self, network: nn.Module, num_outer_blocks: int) -> list[nn.Module]:
        down, up = list(network.down_blocks), list(getattr(network, "up_blocks", []))
        if not up or num_outer_blocks >= len(down):
            return []
        middle = [] if getattr(network, "mid_block", None) is None else [network.mid_block]
        return [*down[num_outer_blocks:], *middle, *up[: len(up) - num_outer_blocks]]

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        if "add_k_proj" in grid_module._modules:
            check_added_kv_call(kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return x.shape[-2], x.shape[-1]


class SpatioTemporalUNet(DiffusersUNet):
    """Stable Video Diffusion's ``UNetSpatioTemporalConditionModel``.

    Blocks, targets and grid: as :class:`DiffusersUNet`.
    """

    description = "Stable Video Diffusion (UNetSpatioTemporalConditionModel)"
    class_names = ("UNetSpatioTemporalConditionModel",)
    timestep_scale = None  # timesteps are 0.25 * log(sigma): their range depends on the scheduler

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, *self.class_names) and super().matches(module)


def mask_argument(blocks: nn.ModuleList) -> str | None:
    """Return the name of the mask argument of the blocks' self-attention.

    None for MMagic's own attention classes, which ignore a mask or expect other shapes.
    """
    attention = next((block.attn1 for block in blocks if hasattr(block, "attn1")), None)
    return "attention_mask" if hasattr(attention, "prepare_attention_mask") else None


def _refused(stack: nn.Module) -> dict[str, str]:
    if not getattr(stack, "have_image_cross", False):
        return {}
    # MMagic's ViCo builds a mask over the image from a block's cross-attention maps.
    reason = (
        "ViCo reads the cross-attention of all tokens. "
        "Merge self-attention and feed-forward only: targets=['attn', 'mlp']"
    )
    return dict.fromkeys(("crossattn", "block", "stack"), reason)


def _stacks(network: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield (name, stack, downsample) in running order.

    The downsample is counted from the samplers that exist: the last down block has none, and
    some UNets omit others.
    """
    downsample = 1
    for index, block in enumerate(network.down_blocks):
        yield from _stacks_in(f"down_blocks.{index}", block, downsample)
        # ControlNet-XS has one for the network and one for the control branch.
        if getattr(block, "downsamplers", None) or getattr(block, "base_downsamplers", None):
            downsample *= 2
    if getattr(network, "mid_block", None) is not None:
        yield from _stacks_in("mid_block", network.mid_block, downsample)
    for index, block in enumerate(getattr(network, "up_blocks", ())):
        yield from _stacks_in(f"up_blocks.{index}", block, downsample)
        if getattr(block, "upsamplers", None):
            downsample //= 2


def _stacks_in(
    prefix: str, block: nn.Module, downsample: int
) -> Iterator[tuple[str, nn.Module, int]]:
    for name, module in block.named_modules():
        if _TEMPORAL.intersection(name.split(".")):
            continue
        has_blocks = isinstance(module._modules.get("transformer_blocks"), nn.ModuleList)
        if has_blocks or is_added_kv(module):
            yield f"{prefix}.{name}", module, downsample
