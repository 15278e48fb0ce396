# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""UNets of diffusers and MMagic: down, middle and up blocks, transformer stacks in between.

Recognized by structure: modules with ``down_blocks`` and ``up_blocks`` (ControlNets:
``controlnet_down_blocks``) and stacks with ``transformer_blocks``.

Attention with added keys (Kandinsky 2.2, DeepFloyd IF, unCLIP) has no blocks around it: it receives
the (B, C, h, w) activations and adds its output to them. Tokens are merged between its norm and
its three projections and unmerged after ``to_out``, so that all positions are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from ..merging.frames import FramePlan
from .base import Block, ModelAdapter, argument, blocks_of
from .transformer import BASIC

# Stacks along frames (video UNets): their tokens lie on no image grid.
_TEMPORAL = {"temp_attentions", "motion_modules"}
_WHOLE = "it is an attention over an image-shaped tensor. Write targets=['attn']"
# Attention along the frames inside a block: an option of MMagic's that its configs leave off.
_ALONG_FRAMES = dict.fromkeys(
    ("block", "stack"),
    "its attention along the frames of one position (unet_use_temporal_attention=True) needs all "
    "positions. Merge inside the block: targets=['attn', 'mlp']",
)
# MMagic's ViCo builds a mask over the image from a block's cross-attention maps.
_VICO = dict.fromkeys(
    ("crossattn", "block", "stack"),
    "ViCo reads the cross-attention of all tokens. Merge self-attention and feed-forward only: "
    "targets=['attn', 'mlp']",
)


class DiffusersUNet(ModelAdapter):
    """``UNet2DConditionModel``, ``ControlNetModel`` and networks with their structure.

    Blocks: members of ``transformer_blocks`` that have ``attn1``, and attention with added keys.
    Targets: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
    Grid: the last two sizes of the stack's (B, C, h, w) input.
    """

    inner_errors = (0.3, 0.1)  # at every guidance scale and scheduler of the demo model
    context_argument = "encoder_hidden_states"
    description = (
        "diffusers UNets (UNet2DConditionModel and others with down_blocks and up_blocks) and "
        "ControlNets"
    )
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        if self.class_names and not super().matches(module):
            return False
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
            if _is_added_kv(stack):
                own = [one for one in (stack.to_k, stack.to_v) if one is not None]
                block = Block(
                    name,
                    stack,
                    grid_module=stack,
                    downsample=downsample,
                    targets={"attn": [stack.to_q, stack.to_out[-1]]},
                    shared_input={"attn": own},
                    refused={"block": _WHOLE, "stack": _WHOLE},
                )
                blocks.append(block)
                continue
            # Where attn1 is given the text, its keys are not the image's.
            of_text = any(
                getattr(block, "only_cross_attention", False) for block in stack.transformer_blocks
            )
            members = blocks_of(
                network,
                f"{name}.transformer_blocks",
                stack,
                **BASIC,
                downsample=downsample,
                context_argument=None if of_text else self.context_argument,
                mask_argument=None if of_text else _mask_argument(stack.transformer_blocks),
                refused=_refused(stack),
            )
            blocks += [block for block in members if "attn" in block.targets]
        return blocks

    def inner_modules(self, network: nn.Module, num_outer_blocks: int) -> list[nn.Module]:
        if not getattr(network, "up_blocks", ()) or num_outer_blocks >= len(network.down_blocks):
            return []
        return [level for _, level in _levels(network)][num_outer_blocks:-num_outer_blocks]

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
        # diffusers pads masks to all positions of the image.
        if "add_k_proj" in grid_module._modules and kwargs.get("attention_mask") is not None:
            raise ToMeError(
                "an attention with added keys received an attention_mask, which does not fit "
                "merged tokens; call the model without it"
            )
        return tuple((args[0] if args else kwargs["hidden_states"]).shape[-2:])


class MMagicUNet(DiffusersUNet):
    """MMagic's ``DenoisingUnet``: laid out like a diffusers UNet, with other argument names."""

    context_argument = "context"
    description = "MMagic's DenoisingUnet (unet_type='stable')"
    class_names = ("DenoisingUnet",)
    timestep_name = "t"


class SpatioTemporalUNet(DiffusersUNet):
    description = "Stable Video Diffusion (UNetSpatioTemporalConditionModel)"
    class_names = ("UNetSpatioTemporalConditionModel",)
    timestep_scale = None  # timesteps are 0.25 * log(sigma): their range depends on the scheduler


class AnimateDiffUNet(DiffusersUNet):
    """Spatial blocks receive the frames of a clip as batch entries: (B * F, N, C) tokens. They are
    merged within each frame, or across the frames of a clip (``across_frames=True``). The motion
    modules in between attend along the frames of one position and are left unchanged."""

    description = (
        "AnimateDiff's UNets (MMagic's UNet3DConditionMotionModel, diffusers' UNetMotionModel)"
    )
    class_names = ("UNet3DConditionMotionModel", "UNetMotionModel")
    has_frames = True

    def frames(self, args: tuple, kwargs: dict) -> int:
        return argument(args, kwargs, 0, "sample").shape[2]  # (B, C, F, h, w)

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not isinstance(plan, FramePlan):
            return args, kwargs
        # Merged tokens of a clip are one batch entry, so the text is needed once per clip.
        once = {
            name: kwargs[name][:: plan.num_frames]
            for name in ("encoder_hidden_states", "encoder_attention_mask", "attention_mask")
            if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape[0] == plan.batch
        }
        return args, {**kwargs, **once}


def _refused(stack: nn.Module) -> dict[str, str]:
    if getattr(stack, "have_image_cross", False):
        return _VICO
    along = any(getattr(b, "attn_temp", None) is not None for b in stack.transformer_blocks)
    return _ALONG_FRAMES if along else {}


def _mask_argument(blocks: nn.ModuleList) -> str | None:
    """Return the name of the mask argument of the blocks' self-attention.

    None for MMagic's own attention classes, which ignore a mask or expect other shapes.
    """
    attention = next((block.attn1 for block in blocks if hasattr(block, "attn1")), None)
    return "attention_mask" if hasattr(attention, "prepare_attention_mask") else None


def _stacks(network: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield (name, stack, downsample) in running order.

    The downsample is counted from the samplers that exist: the last down block has none, and
    some UNets omit others.
    """
    downsample = 1
    for prefix, level in _levels(network):
        for name, module in level.named_modules():
            has_blocks = isinstance(module._modules.get("transformer_blocks"), nn.ModuleList)
            if (has_blocks or _is_added_kv(module)) and not _TEMPORAL.intersection(name.split(".")):
                yield f"{prefix}.{name}", module, downsample
        # ControlNet-XS has one for the network and one for the control branch.
        if getattr(level, "downsamplers", None) or getattr(level, "base_downsamplers", None):
            downsample *= 2
        if getattr(level, "upsamplers", None):
            downsample //= 2


def _levels(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name in ("down_blocks", "mid_block", "up_blocks"):
        levels = getattr(network, name, None)
        if isinstance(levels, nn.ModuleList):
            yield from ((f"{name}.{index}", level) for index, level in enumerate(levels))
        elif levels is not None:
            yield name, levels


def _is_added_kv(module: nn.Module) -> bool:
    return all(map(module._modules.get, ("add_k_proj", "group_norm", "to_q", "to_out")))
