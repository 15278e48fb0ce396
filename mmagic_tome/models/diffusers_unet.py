# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""UNets of diffusers: down, middle and up blocks with transformer stacks between convolutions.

Recognised by structure, not by class: whatever has ``down_blocks``
and ``up_blocks`` (ControlNets: ``controlnet_down_blocks``) and stacks with ``transformer_blocks``
works, of any diffusers version and every variant of ``BasicTransformerBlock`` (ada-norm,
GLIGEN, IP-Adapter ...), since only the modules inside a block are wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .added_kv import added_kv_block, check_added_kv_call, is_added_kv
from .base import Block, Host

# Stacks over frames instead of places (video UNets): their tokens lie on no grid.
_TEMPORAL = {"temp_attentions", "motion_modules"}

# Names of a block's sub-modules, by kind of site.
SITES = {"attn": "attn1", "crossattn": "attn2", "mlp": "ff"}


class DiffusersUNet(Host):
    """Host for ``UNet2DConditionModel``, ``ControlNetModel`` and what is built like them.

    Blocks: members of ``transformer_blocks`` that have ``attn1``.
    Sites: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
    And attention on the picture itself, :mod:`.added_kv`.
    Grid: the last two sizes of the (B, C, h, w) input of the stack.
    """

    context_argument = "encoder_hidden_states"
    description = (
        "diffusers UNets (UNet2DConditionModel and whatever has down_blocks and up_blocks) and "
        "ControlNets"
    )
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        # Its own children: wrappers (torch.compile's, MMagic's) pass attributes of what is
        # inside through, but it is the network inside that is called and must be hooked.
        children = module._modules
        second_half = "up_blocks" in children or "controlnet_down_blocks" in children
        return "down_blocks" in children and second_half

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            block
            for name, stack, downsample in _stacks(network)
            for block in self._blocks_of(name, stack, downsample)
        ]

    def _blocks_of(self, name: str, stack: nn.Module, downsample: int) -> Iterator[Block]:
        if is_added_kv(stack):
            yield added_kv_block(name, stack, downsample)
            return
        for index, block in enumerate(stack.transformer_blocks):
            if getattr(block, "attn1", None) is None:
                continue
            yield Block(
                name=f"{name}.transformer_blocks.{index}",
                module=block,
                stack=stack,
                downsample=downsample,
                sites={
                    kind: getattr(block, attribute)
                    for kind, attribute in SITES.items()
                    if getattr(block, attribute, None) is not None
                },
                context_argument=self.context_argument,
                mask_argument=mask_argument(block.attn1),
                refused=_refused(stack),
            )

    def deep(self, network: nn.Module, outer: int) -> list[nn.Module]:
        down, up = list(network.down_blocks), list(getattr(network, "up_blocks", []))
        if not up or outer >= len(down):
            return []
        middle = [] if getattr(network, "mid_block", None) is None else [network.mid_block]
        return [*down[outer:], *middle, *up[: len(up) - outer]]

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        if is_added_kv(stack):
            check_added_kv_call(kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return x.shape[-2], x.shape[-1]


def mask_argument(attn: nn.Module) -> str | None:
    """Where diffusers' attention takes what is added to the scores of keys; MMagic's own classes
    drop a mask, or take one of other shapes."""
    return "attention_mask" if hasattr(attn, "prepare_attention_mask") else None


def _refused(stack: nn.Module) -> dict[str, str]:
    """MMagic's ViCo lays the cross-attention maps of a block over the picture afterwards."""
    if not getattr(stack, "have_image_cross", False):
        return {}
    reason = (
        "ViCo reads the cross-attention of all tokens there. "
        "Merge self-attention and feed-forward only: sites=['attn', 'mlp']"
    )
    return dict.fromkeys(("crossattn", "block", "stack"), reason)


def _stacks(network: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, stack, downsample) in running order.

    The downsample is counted from the samplers that really are in the network:
    the last down block has none, and some UNets skip others.
    """
    downsample = 1
    for index, block in enumerate(network.down_blocks):
        yield from _stacks_in(f"down_blocks.{index}", block, downsample)
        # ControlNet-XS has one for the network and one for the branch beside it.
        if getattr(block, "downsamplers", None) or getattr(block, "base_downsamplers", None):
            downsample *= 2
    if getattr(network, "mid_block", None) is not None:
        yield from _stacks_in("mid_block", network.mid_block, downsample)
    for index, block in enumerate(getattr(network, "up_blocks", ())):
        yield from _stacks_in(f"up_blocks.{index}", block, downsample)
        if getattr(block, "upsamplers", None):
            downsample //= 2


def _stacks_in(prefix: str, block: nn.Module, downsample: int):
    for name, module in block.named_modules():
        if _TEMPORAL.intersection(name.split(".")):
            continue
        has_blocks = isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList)
        if has_blocks or is_added_kv(module):
            yield f"{prefix}.{name}", module, downsample
