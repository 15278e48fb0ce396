# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers of the transformers library: one row of names per family."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn

from ..interface import ConfigProxy
from .base import Heads, ViT, ViTBlock, instances, join


@dataclass(frozen=True)
class TransformersViT:
    """A family of the transformers library, by the names of its modules.

    Attributes:
        module (str): below ``transformers.models``.
        network (str): class whose call is a forward.
        layers (str): path of the list of blocks. The following paths are within a block.
        first, norm (str): norms of attention and feed-forward.
        attention, output, last (str): see :class:`~.base.ViTBlock`. Default of ``output``:
            ``attention``.
        linear (str): first linear layer of the feed-forward.
        projections (tuple): queries, keys and values, within ``attention``.
        prefix (int): protected tokens without registers.
        reads_all (bool): whether what follows always reads more than the protected tokens.
        reads_all_in (tuple): classes with a head that does.
        takes_mask (bool): whether the attention has an argument for a mask.
    """

    description: str
    module: str
    network: str
    layers: str = "layers"
    first: str = "layernorm_before"
    norm: str = "layernorm_after"
    attention: str = "attention"
    output: str = ""
    last: str = "mlp"
    linear: str = "mlp.fc1"
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    prefix: int = 0
    reads_all: bool = False
    reads_all_in: tuple[str, ...] = ()
    takes_mask: bool = True

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(path, module) of every one inside a model."""
        library = sys.modules.get(f"transformers.models.{self.module}")
        return instances(model, getattr(library, self.network, None))

    def describe(self, path: str, network: nn.Module, model: nn.Module) -> ViT:
        """The modules to hook."""
        classes = {type(module).__name__ for module in model.modules()}
        return ViT(
            description=self.description,
            network=network,
            blocks=[
                self._block(join(path, self.layers, str(index)), layer)
                for index, layer in enumerate(network.get_submodule(self.layers))
            ],
            prefix=self.prefix + getattr(network.config, "num_register_tokens", 0),
            reads_all=self.reads_all or not classes.isdisjoint(self.reads_all_in),
            mask="attention_mask" if self.takes_mask else None,
            injection=None if self.takes_mask else ConfigProxy,
        )

    def _block(self, name: str, layer: nn.Module) -> ViTBlock:
        attention = layer.get_submodule(self.attention)
        dim = getattr(attention, "head_dim", None) or attention.attention_head_size
        gate = getattr(getattr(layer, "mlp", None), "gate_proj", None)
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
            # A gated feed-forward has three projections.
            hidden=(
                layer.get_submodule(self.linear).out_features
                if gate is None
                else gate.out_features * 3 // 2
            ),
        )


TRANSFORMERS = (
    TransformersViT(
        description="transformers ViT",
        module="vit.modeling_vit",
        network="ViTModel",
        prefix=1,
        reads_all_in=("ViTForMaskedImageModeling",),
    ),
    TransformersViT(
        description="transformers DeiT",
        module="deit.modeling_deit",
        network="DeiTModel",
        prefix=2,
        reads_all_in=("DeiTForMaskedImageModeling",),
    ),
    TransformersViT(
        description="transformers CLIPVisionModel",
        module="clip.modeling_clip",
        network="CLIPVisionModel",
        layers="encoder.layers",
        first="layer_norm1",
        norm="layer_norm2",
        attention="self_attn",
        prefix=1,
        reads_all_in=("CLIPForImageClassification",),
    ),
    TransformersViT(
        description="transformers SiglipVisionModel",
        module="siglip.modeling_siglip",
        network="SiglipVisionModel",
        layers="encoder.layers",
        first="layer_norm1",
        norm="layer_norm2",
        attention="self_attn",
        reads_all=True,
    ),
    TransformersViT(
        description="transformers DINOv2",
        module="dinov2.modeling_dinov2",
        network="Dinov2Model",
        layers="encoder.layer",
        first="norm1",
        norm="norm2",
        prefix=1,
        reads_all_in=("Dinov2ForImageClassification", "FocusViT"),
    ),
    TransformersViT(
        description="transformers DINOv2 with registers",
        module="dinov2_with_registers.modeling_dinov2_with_registers",
        network="Dinov2WithRegistersModel",
        layers="encoder.layer",
        first="norm1",
        norm="norm2",
        prefix=1,
        reads_all_in=("Dinov2WithRegistersForImageClassification",),
    ),
    TransformersViT(
        description="transformers VideoMAE",
        module="videomae.modeling_videomae",
        network="VideoMAEModel",
        layers="encoder.layer",
        attention="attention.attention",
        output="attention",
        last="output.dense",
        linear="intermediate.dense",
        projections=("query", "key", "value"),
        reads_all=True,
        takes_mask=False,
    ),
    TransformersViT(
        description="transformers AST",
        module="audio_spectrogram_transformer.modeling_audio_spectrogram_transformer",
        network="ASTModel",
        prefix=2,
    ),
    TransformersViT(
        description="transformers Whisper encoder",
        module="whisper.modeling_whisper",
        network="WhisperEncoder",
        first="self_attn_layer_norm",
        norm="final_layer_norm",
        attention="self_attn",
        last="fc2",
        linear="fc1",
        reads_all=True,
    ),
)
