# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The known vision transformers, by the names of their modules, and what the hooks need of them.

No library is imported: a model of a library that is not imported cannot exist.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from torch import nn

from ..errors import ToMeError
from .interface import BiasedAttention, ConfigProxy, Injection

KINDS = ("queries", "keys", "values")


@dataclass(frozen=True)
class ViTBlock:
    """The modules of one block."""

    name: str  # dotted path in the model
    module: nn.Module  # the block, (B, N, C) -> (B, N, C)
    first: nn.Module  # its first norm, whose input is the block's
    attention: nn.Module  # whose call takes the attention mask
    output: nn.Module  # that returns the attention's output, projection included
    norm: nn.Module  # of the feed-forward; its input is merged
    last: nn.Module  # end of the feed-forward, before the residual addition
    # Of KINDS: (module, which third of its output; None: all), the heads' channels joined or
    # (B, heads, N, C).
    sources: dict[str, tuple[nn.Module, int | None]]
    head_dim: int  # channels of a head

    @property
    def hidden(self) -> int:
        """Channels inside the feed-forward, as if it had two projections of equal size."""
        attention = set(self.output.modules())
        linear = [part for part in self.module.modules() if isinstance(part, nn.Linear)]
        sizes = [p.in_features * p.out_features for p in linear if p not in attention]
        return sum(sizes) // (2 * self.norm.normalized_shape[-1])


@dataclass(frozen=True)
class ViT:
    """A vision transformer inside a model."""

    network: nn.Module  # whose call is a forward
    blocks: list[ViTBlock]  # in running order
    prefix: int  # protected tokens at the front: class, distillation, registers
    reads_all: bool  # whether what follows the blocks reads more than the protected tokens
    mask: str | type[Injection]  # see Family


@dataclass(frozen=True)
class Family:
    """Vision transformers that are instances of one class; paths below ``layers`` are within a
    block."""

    library: str  # module that defines the class
    network: str  # name of the class, whose call is a forward
    layers: str = "layers"  # the list of blocks
    first: str = "layernorm_before"  # for these five see ViTBlock
    norm: str = "layernorm_after"
    attention: str = "attention"
    output: str = ""  # '' is the attention
    last: str = "mlp"
    # Within the attention, of KINDS; 'qkv' is one projection to all three.
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    prefix: int = 0  # protected tokens without registers
    reads_all: bool = False  # whether what follows always reads more than the protected tokens
    reads_all_in: str = ""  # classes with a head that does
    # The attention's argument for an additive mask; where it has none, what adds the bias.
    mask: str | type[Injection] = "attention_mask"
    types: tuple[str, ...] = ()  # of block and attention in the library; (): any

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(path, module) of every one inside a model."""
        kind = getattr(sys.modules.get(self.library), self.network, None)
        if kind is None:
            return []
        return [(name, one) for name, one in model.named_modules() if isinstance(one, kind)]

    def describe(self, path: str, network: nn.Module, model: nn.Module) -> ViT:
        """What to hook in one at ``path`` of ``model``; ToMeError: blocks or a forward of another
        kind."""
        blocks = [
            self.block(".".join(filter(None, (path, self.layers, str(index)))), layer)
            for index, layer in enumerate(network.get_submodule(self.layers))
        ]
        return ViT(network, blocks, *self.tokens(network, model), self.mask)

    def tokens(self, network: nn.Module, model: nn.Module) -> tuple[int, bool]:
        """Number of protected tokens, and whether what follows reads others too."""
        classes = {type(module).__name__ for module in model.modules()}
        registers = getattr(network.config, "num_register_tokens", 0)
        reads_all = self.reads_all or not classes.isdisjoint(self.reads_all_in.split())
        return self.prefix + registers, reads_all

    def block(self, name: str, layer: nn.Module) -> ViTBlock:
        """The modules of the block at ``name``."""
        found = [type(one) for one in (layer, getattr(layer, self.attention, None))]
        found = [getattr(kind, "_intercepted_class", kind) for kind in found]
        wanted = [getattr(sys.modules[self.library], kind) for kind in self.types]
        if wanted and found != wanted:
            raise ToMeError(
                f"{name} is a {' with '.join(kind.__name__ for kind in found)}; of this library "
                f"only {' with '.join(self.types)} can be merged"
            )
        attention = layer.get_submodule(self.attention)
        sources = {}
        for part, (kind, path) in enumerate(zip(KINDS, self.projections)):
            sources[kind] = attention.get_submodule(path), part if path == "qkv" else None
        dims = [getattr(attention, key, None) for key in ("head_dim", "head_dims")]
        return ViTBlock(
            name=name,
            module=layer,
            first=layer.get_submodule(self.first),
            attention=attention,
            output=layer.get_submodule(self.output or self.attention),
            norm=layer.get_submodule(self.norm),
            last=layer.get_submodule(self.last),
            sources=sources,
            head_dim=dims[0] or dims[1] or attention.attention_head_size,
        )


class TimmViT(Family):
    """VisionTransformer of timm and its subclasses."""

    def tokens(self, network: nn.Module, model: nn.Module) -> tuple[int, bool]:
        pools = network.attn_pool is not None or network.global_pool != "token"
        return network.num_prefix_tokens, pools


class MMPretrainViT(Family):
    """VisionTransformer of mmpretrain and the subclasses that keep its forward."""

    def tokens(self, network: nn.Module, model: nn.Module) -> tuple[int, bool]:
        backbones = sys.modules["mmpretrain.models.backbones"]
        forward, distilled = type(network).forward, backbones.DistilledVisionTransformer.forward
        if forward not in (backbones.VisionTransformer.forward, distilled):
            raise ToMeError(
                f"{type(network).__name__} of mmpretrain has a forward of its own; of its vision "
                "transformers VisionTransformer and DistilledVisionTransformer can be merged"
            )
        reads_all = forward is not distilled and network.out_type != "cls_token"
        if reads_all and list(network.out_indices) != [len(network.layers) - 1]:
            raise ToMeError(
                f"out_type={network.out_type!r} with out_indices={tuple(network.out_indices)} "
                "reads the tokens of blocks in the middle, which stay merged; write out_indices=-1 "
                "or out_type='cls_token'"
            )
        return network.num_extra_tokens, reads_all


def _transformers(folder: str, network: str, **options: object) -> Family:
    return Family(f"transformers.models.{folder}.modeling_{folder}", network, **options)


_CLIP = dict(
    layers="encoder.layers", first="layer_norm1", norm="layer_norm2", attention="self_attn"
)
_DINO = dict(layers="encoder.layer", first="norm1", norm="norm2", prefix=1)
_VIDEOMAE = dict(layers="encoder.layer", attention="attention.attention", output="attention")
_WHISPER = dict(
    first="self_attn_layer_norm", norm="final_layer_norm", attention="self_attn", last="fc2"
)
_TIMM = dict(layers="blocks", first="norm1", norm="norm2", attention="attn", mask="attn_mask")
# The output of dropout_layer is added to the input of the feed-forward.
_MMPRETRAIN = dict(first="ln1", norm="ln2", attention="attn", last="ffn.dropout_layer")

FAMILIES = (
    _transformers("vit", "ViTModel", prefix=1, reads_all_in="ViTForMaskedImageModeling"),
    _transformers("deit", "DeiTModel", prefix=2, reads_all_in="DeiTForMaskedImageModeling"),
    _transformers(
        "clip", "CLIPVisionModel", prefix=1, reads_all_in="CLIPForImageClassification", **_CLIP
    ),
    _transformers("siglip", "SiglipVisionModel", reads_all=True, **_CLIP),
    _transformers(
        "dinov2", "Dinov2Model", reads_all_in="Dinov2ForImageClassification FocusViT", **_DINO
    ),
    _transformers(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        reads_all_in="Dinov2WithRegistersForImageClassification",
        **_DINO,
    ),
    _transformers(
        "videomae",
        "VideoMAEModel",
        last="output.dense",
        projections=("query", "key", "value"),
        reads_all=True,
        mask=ConfigProxy,
        **_VIDEOMAE,
    ),
    _transformers("audio_spectrogram_transformer", "ASTModel", prefix=2),
    _transformers("whisper", "WhisperEncoder", reads_all=True, **_WHISPER),
    TimmViT(
        "timm.models.vision_transformer",
        "VisionTransformer",
        projections=("q_norm", "k_norm", "qkv"),
        types=("Block", "Attention"),
        **_TIMM,
    ),
    MMPretrainViT(
        "mmpretrain.models.backbones.vision_transformer",
        "VisionTransformer",
        projections=("qkv", "qkv", "qkv"),
        mask=BiasedAttention,
        types=("TransformerEncoderLayer", "MultiheadAttention"),
        **_MMPRETRAIN,
    ),
)

# Class names -> why these models cannot be merged.
_UNSUPPORTED = {
    r"DINOv3ViT\w*|Eva": "rotates queries and keys by position, which merged tokens do not have",
    r"Beit\w*|Data2VecVision\w*": "adds a bias to every pair of positions",
    r"(Swin|Hiera|Sam2?Vision|VitDet|MaxxVit)\w*": "attends in windows of a grid",
    r"Siglip2\w*": "receives padded images with an attention mask",
}


def find_vit(model: object) -> ViT:
    """The one vision transformer inside ``model``: a module of one of the families, or one that
    contains it, also wrapped by DistributedDataParallel or torch.compile. ToMeError: there is none,
    or several."""
    found = []
    if isinstance(model, nn.Module):
        for family in FAMILIES:
            found += [(family, path, network) for path, network in family.find(model)]
    known = [f"{family.library.partition('.')[0]} {family.network}" for family in FAMILIES]
    if not found:
        raise ToMeError(
            f"no vision transformer to merge in a {type(model).__name__}. "
            f"{_why_unsupported(model)}Supported: {', '.join(known)}. Pass one of these, or a "
            "model that has one inside; for a diffusion model write ratio in place of r"
        )
    if len(found) > 1:
        paths = ", ".join(repr(path) for _, path, _ in found)
        raise ToMeError(
            f"{len(found)} vision transformers in a {type(model).__name__}: {paths}; pass one of "
            "these submodules"
        )
    ((family, path, network),) = found
    try:
        return family.describe(path, network, model)
    except (AttributeError, KeyError) as error:
        # Libraries rename the parts of their models from one major version to the next.
        raise ToMeError(
            f"this {type(network).__name__} is not built as those of transformers 5, timm 1 and "
            f"mmpretrain 1.2 are ({error}); install one of these"
        ) from error


def _why_unsupported(model: object) -> str:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        name = type(module).__name__
        for names, why in _UNSUPPORTED.items():
            if re.fullmatch(names, name):
                return f"{name} {why}. "
    return ""
