# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What vision transformers look like: where their blocks are, and the places inside a block.

Unlike the hosts of diffusion models these need no grid, no timestep and no levels, but
know how many tokens at the front are protected, and where a block's queries, keys and values come
from. No library is imported: a model of a library that nobody imported cannot be there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..errors import ToMeError
from .interface import AttributeInjection, ConfigInjection


@dataclass(frozen=True)
class ViTBlock:
    """The places of one block.

    Attributes:
        name (str): dotted path in the model.
        module (nn.Module): the block; gives (B, N, C) for (B, N, C).
        first (nn.Module): its first norm, which is given what the block is given.
        attention (nn.Module): whose call takes the attention mask.
        output (nn.Module): whose output is the attention's, after its last projection.
        norm (nn.Module): of the feed-forward; what goes into it is where merging sits.
        last (nn.Module): the last of the feed-forward, before anything is added.
        sources (dict): 'queries', 'keys', 'values' -> (module, :class:`Heads`).
        hidden (int): channels inside the feed-forward, as if it had two projections.
    """

    name: str
    module: nn.Module
    first: nn.Module
    attention: nn.Module
    output: nn.Module
    norm: nn.Module
    last: nn.Module
    sources: dict[str, tuple[nn.Module, Heads]]
    hidden: int


@dataclass(frozen=True)
class Heads:
    """How a module's output holds the heads.

    Attributes:
        dim (int): channels of a head; 0: the output is (B, heads, N, dim) already, else it
            is (B, N, parts * heads * dim).
        part (int): which of the parts of a joint projection. Default 0.
        parts (int): of a joint projection. Default 1.
    """

    dim: int
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class ViT:
    """A vision transformer that was found.

    Attributes:
        description (str): of its family.
        root (nn.Module): the module whose call is a forward.
        blocks (list): of :class:`ViTBlock`, in running order.
        prefix (int): protected tokens at the front: class, distillation, registers.
        mask (str | None): argument of ``attention`` that an additive mask can be given by; None:
            it has none, and ``injection`` says how it gets the bias.
        reads_all (bool): whether what follows the blocks reads more than the protected tokens.
        injection (type): of :mod:`.interface`, for modules without an argument for a mask.
    """

    description: str
    root: nn.Module
    blocks: list[ViTBlock]
    prefix: int
    mask: str | None
    reads_all: bool
    injection: type = ConfigInjection


@dataclass(frozen=True)
class _Transformers:
    """A family of the transformers library, by the names of its parts."""

    description: str
    module: str  # below transformers.models
    root: str  # class
    layers: str
    attention: str
    norm: str
    last: str
    prefix: Callable[[nn.Module], int]
    reads_all: Callable[[nn.Module, set[str]], bool]
    output: str = ""  # default: attention
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    mask: str | None = "attention_mask"
    first_linear: str = "mlp.fc1"

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        module = sys.modules.get(f"transformers.models.{self.module}")
        root = getattr(module, self.root, None)
        return [] if root is None else _instances(model, root)

    def describe(self, path: str, root: nn.Module, model: nn.Module) -> ViT:
        layers = root.get_submodule(self.layers)
        blocks = []
        for index, layer in enumerate(layers):
            attention = layer.get_submodule(self.attention)
            dim = getattr(attention, "head_dim", None) or attention.attention_head_size
            sources = {
                kind: (attention.get_submodule(name), Heads(dim))
                for kind, name in zip(("queries", "keys", "values"), self.projections)
            }
            blocks.append(
                ViTBlock(
                    name=".".join(part for part in (path, self.layers, str(index)) if part),
                    module=layer,
                    first=layer.get_submodule(_FIRST_NORM[self.norm]),
                    attention=attention,
                    output=layer.get_submodule(self.output or self.attention),
                    norm=layer.get_submodule(self.norm),
                    last=layer.get_submodule(self.last),
                    sources=sources,
                    hidden=_hidden(layer, self.first_linear),
                )
            )
        outer = {type(module).__name__ for module in model.modules()}
        reads_all = self.reads_all(root, outer)
        return ViT(self.description, root, blocks, self.prefix(root), self.mask, reads_all)


class _Timm:
    """VisionTransformer of timm and its subclasses."""

    description = "timm VisionTransformer"

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        module = sys.modules.get("timm.models.vision_transformer")
        root = getattr(module, "VisionTransformer", None)
        return [] if root is None else _instances(model, root)

    def describe(self, path: str, root: nn.Module, model: nn.Module) -> ViT:
        library = sys.modules["timm.models.vision_transformer"]
        blocks = []
        for index, block in enumerate(root.blocks):
            name = ".".join(part for part in (path, "blocks", str(index)) if part)
            attention = getattr(block, "attn", None)
            if type(block) is not library.Block or type(attention) is not library.Attention:
                raise ToMeError(
                    f"{name} is a {type(block).__name__} with {type(attention).__name__}; of "
                    "timm's blocks only Block with Attention can be merged"
                )
            sources = {
                "queries": (attention.q_norm, Heads(0)),
                "keys": (attention.k_norm, Heads(0)),
                "values": (attention.qkv, Heads(attention.head_dim, 2, 3)),
            }
            blocks.append(
                ViTBlock(
                    name=name,
                    module=block,
                    first=block.norm1,
                    attention=attention,
                    output=attention,
                    norm=block.norm2,
                    last=block.mlp,
                    sources=sources,
                    hidden=next(
                        part.out_features for part in block.mlp.modules() if hasattr(part, "weight")
                    ),
                )
            )
        pooled = root.attn_pool is not None or root.global_pool != "token"
        return ViT(self.description, root, blocks, root.num_prefix_tokens, "attn_mask", pooled)


class _MMPretrain:
    """VisionTransformer of mmpretrain and those of its subclasses that run as it does."""

    description = "mmpretrain VisionTransformer"

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        module = sys.modules.get("mmpretrain.models.backbones.vision_transformer")
        root = getattr(module, "VisionTransformer", None)
        return [] if root is None else _instances(model, root)

    def describe(self, path: str, root: nn.Module, model: nn.Module) -> ViT:
        backbones = sys.modules["mmpretrain.models.backbones"]
        utils = sys.modules["mmpretrain.models.utils"]
        library = sys.modules["mmpretrain.models.backbones.vision_transformer"]
        known = (backbones.VisionTransformer.forward, backbones.DistilledVisionTransformer.forward)
        if type(root).forward not in known:
            raise ToMeError(
                f"{type(root).__name__} of mmpretrain has a forward of its own; of its vision "
                "transformers VisionTransformer and DistilledVisionTransformer can be merged"
            )
        blocks = []
        for index, layer in enumerate(root.layers):
            name = ".".join(part for part in (path, "layers", str(index)) if part)
            attention = getattr(layer, "attn", None)
            if (
                type(layer) is not library.TransformerEncoderLayer
                or type(attention) is not utils.MultiheadAttention
            ):
                raise ToMeError(
                    f"{name} is a {type(layer).__name__} with {type(attention).__name__}; of "
                    "mmpretrain only TransformerEncoderLayer with MultiheadAttention can be merged"
                )
            sources = {
                kind: (attention.qkv, Heads(attention.head_dims, part, 3))
                for part, kind in enumerate(("queries", "keys", "values"))
            }
            gated = hasattr(layer.ffn, "w12")
            blocks.append(
                ViTBlock(
                    name=name,
                    module=layer,
                    first=layer.ln1,
                    attention=attention,
                    output=attention,
                    norm=layer.ln2,
                    # What it gives is added to the tokens that went into the feed-forward.
                    last=layer.ffn.dropout_layer,
                    sources=sources,
                    hidden=(
                        layer.ffn.w3.in_features * 3 // 2
                        if gated
                        else layer.ffn.feedforward_channels
                    ),
                )
            )
        distilled = type(root).forward is backbones.DistilledVisionTransformer.forward
        reads_all = not distilled and root.out_type != "cls_token"
        if reads_all and list(root.out_indices) != [len(blocks) - 1]:
            raise ToMeError(
                f"out_type={root.out_type!r} with out_indices={tuple(root.out_indices)} reads the "
                "tokens of blocks in the middle, which stay merged; write out_indices=-1 or "
                "out_type='cls_token'"
            )
        prefix = root.num_extra_tokens
        return ViT(self.description, root, blocks, prefix, None, reads_all, AttributeInjection)


def _instances(model: nn.Module, kind: type) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _hidden(layer: nn.Module, linear: str) -> int:
    gate = getattr(getattr(layer, "mlp", None), "gate_proj", None)
    if gate is not None:  # gated: three projections
        return gate.out_features * 3 // 2
    return layer.get_submodule(linear).out_features


# The norm in front of the attention, by that in front of the feed-forward.
_FIRST_NORM = {
    "layernorm_after": "layernorm_before",
    "layer_norm2": "layer_norm1",
    "norm2": "norm1",
    "final_layer_norm": "self_attn_layer_norm",
}

FAMILIES = (
    _Transformers(
        "transformers ViT",
        "vit.modeling_vit",
        "ViTModel",
        "layers",
        "attention",
        "layernorm_after",
        "mlp",
        prefix=lambda root: 1,
        reads_all=lambda root, outer: "ViTForMaskedImageModeling" in outer,
    ),
    _Transformers(
        "transformers DeiT",
        "deit.modeling_deit",
        "DeiTModel",
        "layers",
        "attention",
        "layernorm_after",
        "mlp",
        prefix=lambda root: 2,
        reads_all=lambda root, outer: "DeiTForMaskedImageModeling" in outer,
    ),
    _Transformers(
        "transformers CLIPVisionModel",
        "clip.modeling_clip",
        "CLIPVisionModel",
        "encoder.layers",
        "self_attn",
        "layer_norm2",
        "mlp",
        prefix=lambda root: 1,
        reads_all=lambda root, outer: "CLIPForImageClassification" in outer,
    ),
    _Transformers(
        "transformers SiglipVisionModel",
        "siglip.modeling_siglip",
        "SiglipVisionModel",
        "encoder.layers",
        "self_attn",
        "layer_norm2",
        "mlp",
        prefix=lambda root: 0,
        reads_all=lambda root, outer: True,
    ),
    _Transformers(
        "transformers DINOv2",
        "dinov2.modeling_dinov2",
        "Dinov2Model",
        "encoder.layer",
        "attention",
        "norm2",
        "mlp",
        prefix=lambda root: 1,
        reads_all=lambda root, outer: bool(outer & {"Dinov2ForImageClassification", "FocusViT"}),
    ),
    _Transformers(
        "transformers DINOv2 with registers",
        "dinov2_with_registers.modeling_dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "encoder.layer",
        "attention",
        "norm2",
        "mlp",
        prefix=lambda root: 1 + root.config.num_register_tokens,
        reads_all=lambda root, outer: "Dinov2WithRegistersForImageClassification" in outer,
    ),
    _Transformers(
        "transformers VideoMAE",
        "videomae.modeling_videomae",
        "VideoMAEModel",
        "encoder.layer",
        "attention.attention",
        "layernorm_after",
        "output.dense",
        prefix=lambda root: 0,
        reads_all=lambda root, outer: True,
        output="attention",
        projections=("query", "key", "value"),
        mask=None,
        first_linear="intermediate.dense",
    ),
    _Transformers(
        "transformers AST",
        "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer",
        "ASTModel",
        "layers",
        "attention",
        "layernorm_after",
        "mlp",
        prefix=lambda root: 2,
        reads_all=lambda root, outer: False,
    ),
    _Transformers(
        "transformers Whisper encoder",
        "whisper.modeling_whisper",
        "WhisperEncoder",
        "layers",
        "self_attn",
        "final_layer_norm",
        "fc2",
        prefix=lambda root: 0,
        reads_all=lambda root, outer: True,
        first_linear="fc1",
    ),
    _Timm(),
    _MMPretrain(),
)


# Class names -> why models of theirs cannot be merged.
_UNSUPPORTED = {
    r"DINOv3ViT\w*|Eva": "rotates queries and keys by position, which a merged token has not",
    r"Beit\w*|Data2VecVision\w*": "adds a number of its own to every pair of places",
    r"(Swin|Hiera|Sam2?Vision|VitDet|MaxxVit)\w*": "attends in windows of a grid",
    r"Siglip2\w*": "is given padded pictures with an attention mask",
}


def _why_unsupported(model: object) -> str:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        name = type(module).__name__
        for names, why in _UNSUPPORTED.items():
            if re.fullmatch(names, name):
                return f"{name} {why}. "
    return ""


def find_vit(model: object) -> ViT:
    """The one vision transformer inside ``model``.

    Args:
        model: a module of one of the families, or one that has it inside, also wrapped by
            DistributedDataParallel or torch.compile.

    Raises:
        ToMeError: there is none, or several.
    """
    found = []
    if isinstance(model, nn.Module):
        for family in FAMILIES:
            found += [(family, path, root) for path, root in family.find(model)]
    known = ", ".join(family.description for family in FAMILIES)
    if not found:
        raise ToMeError(
            f"no vision transformer to merge in a {type(model).__name__}. "
            f"{_why_unsupported(model)}Supported: {known}. Pass one of these, or a model that has "
            "one inside; for a diffusion model write ratio in place of r"
        )
    if len(found) > 1:
        paths = ", ".join(repr(path) for _, path, _ in found)
        raise ToMeError(
            f"{len(found)} vision transformers in a {type(model).__name__}: {paths}; pass one of "
            "these submodules"
        )
    ((family, path, root),) = found
    try:
        return family.describe(path, root, model)
    except (AttributeError, KeyError) as error:
        # Libraries rename the parts of their models from one major version to the next.
        raise ToMeError(
            f"this {type(root).__name__} is not built as those of transformers 5, timm 1 and "
            f"mmpretrain 1.2 are ({error}); install one of these"
        ) from error
