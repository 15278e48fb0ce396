# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers of the transformers library: one row of names per family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..interface import ConfigProxy
from .base import Family, Heads, ViT, ViTBlock


@dataclass(frozen=True)
class TransformersViT(Family):
    """A family of the transformers library, by the names of its modules; paths below ``layers`` are
    within a block."""

    description: str
    folder: str  # of transformers.models
    network: str  # class whose call is a forward
    layers: str = "layers"
    first: str = "layernorm_before"  # for these four see ViTBlock
    norm: str = "layernorm_after"
    attention: str = "attention"
    output: str = ""  # '' is the attention
    last: str = "mlp"
    linear: str = "mlp.fc1"  # first linear layer of the feed-forward
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")  # within the attention
    prefix: int = 0  # protected tokens without registers
    reads_all: bool = False  # whether what follows always reads more than the protected tokens
    reads_all_in: tuple[str, ...] = ()  # classes with a head that does
    takes_mask: bool = True  # whether the attention has an argument for a mask

    @property
    def library(self) -> str:
        """See :class:`Family`."""
        return f"transformers.models.{self.folder}.modeling_{self.folder}"

    def describe(self, path: str, network: nn.Module, model: nn.Module) -> ViT:
        classes = {type(module).__name__ for module in model.modules()}
        return ViT(
            network=network,
            blocks=self.blocks(path, network),
            prefix=self.prefix + getattr(network.config, "num_register_tokens", 0),
            reads_all=self.reads_all or not classes.isdisjoint(self.reads_all_in),
            mask="attention_mask" if self.takes_mask else None,
            injection=None if self.takes_mask else ConfigProxy,
        )

    def block(self, name: str, layer: nn.Module) -> ViTBlock:
        attention = layer.get_submodule(self.attention)
        dim = getattr(attention, "head_dim", None) or attention.attention_head_size
        gate = getattr(getattr(layer, "mlp", None), "gate_proj", None)
        if gate is None:
            hidden = layer.get_submodule(self.linear).out_features
        else:  # three projections
            hidden = gate.out_features * 3 // 2
        return ViTBlock(
            name=name,
            module=layer,
            first=layer.get_submodule(self.first),
            attention=attention,
            output=layer.get_submodule(self.output or self.attention),
            norm=layer.get_submodule(self.norm),
            last=layer.get_submodule(self.last),
            sources={
                kind: (attention.get_submodule(name), Heads(dim))
                for kind, name in zip(("queries", "keys", "values"), self.projections)
            },
            hidden=hidden,
        )


_CLIP = {
    "layers": "encoder.layers",
    "first": "layer_norm1",
    "norm": "layer_norm2",
    "attention": "self_attn",
}
_DINO = {"layers": "encoder.layer", "first": "norm1", "norm": "norm2", "prefix": 1}

TRANSFORMERS = (
    TransformersViT(
        "transformers ViT", "vit", "ViTModel", prefix=1, reads_all_in=("ViTForMaskedImageModeling",)
    ),
    TransformersViT(
        "transformers DeiT",
        "deit",
        "DeiTModel",
        prefix=2,
        reads_all_in=("DeiTForMaskedImageModeling",),
    ),
    TransformersViT(
        "transformers CLIPVisionModel",
        "clip",
        "CLIPVisionModel",
        **_CLIP,
        prefix=1,
        reads_all_in=("CLIPForImageClassification",),
    ),
    TransformersViT(
        "transformers SiglipVisionModel", "siglip", "SiglipVisionModel", **_CLIP, reads_all=True
    ),
    TransformersViT(
        "transformers DINOv2",
        "dinov2",
        "Dinov2Model",
        **_DINO,
        reads_all_in=("Dinov2ForImageClassification", "FocusViT"),
    ),
    TransformersViT(
        "transformers DINOv2 with registers",
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        **_DINO,
        reads_all_in=("Dinov2WithRegistersForImageClassification",),
    ),
    TransformersViT(
        "transformers VideoMAE",
        "videomae",
        "VideoMAEModel",
        layers="encoder.layer",
        attention="attention.attention",
        output="attention",
        last="output.dense",
        linear="intermediate.dense",
        projections=("query", "key", "value"),
        reads_all=True,
        takes_mask=False,
    ),
    TransformersViT("transformers AST", "audio_spectrogram_transformer", "ASTModel", prefix=2),
    TransformersViT(
        "transformers Whisper encoder",
        "whisper",
        "WhisperEncoder",
        first="self_attn_layer_norm",
        norm="final_layer_norm",
        attention="self_attn",
        last="fc2",
        linear="fc1",
        reads_all=True,
    ),
)
