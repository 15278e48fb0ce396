# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers of mmpretrain."""

from __future__ import annotations

import sys

from torch import nn

from ...errors import ToMeError
from ..interface import BiasedAttention
from .base import Family, Heads, ViT, ViTBlock, check_types


class MMPretrainViT(Family):
    """VisionTransformer of mmpretrain and the subclasses that keep its forward."""

    description = "mmpretrain VisionTransformer"
    library = "mmpretrain.models.backbones.vision_transformer"
    network = "VisionTransformer"
    layers = "layers"

    def describe(self, path: str, network: nn.Module, model: nn.Module) -> ViT:
        backbones = sys.modules["mmpretrain.models.backbones"]
        distilled = backbones.DistilledVisionTransformer.forward
        if type(network).forward not in (backbones.VisionTransformer.forward, distilled):
            raise ToMeError(
                f"{type(network).__name__} of mmpretrain has a forward of its own; of its vision "
                "transformers VisionTransformer and DistilledVisionTransformer can be merged"
            )
        blocks = self.blocks(path, network)
        reads_all = type(network).forward is not distilled and network.out_type != "cls_token"
        if reads_all and list(network.out_indices) != [len(blocks) - 1]:
            raise ToMeError(
                f"out_type={network.out_type!r} with out_indices={tuple(network.out_indices)} "
                "reads the tokens of blocks in the middle, which stay merged; write out_indices=-1 "
                "or out_type='cls_token'"
            )
        return ViT(
            network=network,
            blocks=blocks,
            prefix=network.num_extra_tokens,
            reads_all=reads_all,
            injection=BiasedAttention,
        )

    def block(self, name: str, layer: nn.Module) -> ViTBlock:
        library, utils = sys.modules[self.library], sys.modules["mmpretrain.models.utils"]
        attention = getattr(layer, "attn", None)
        expected = (library.TransformerEncoderLayer, utils.MultiheadAttention)
        check_types(name, layer, attention, *expected)
        gated = hasattr(layer.ffn, "w12")
        return ViTBlock(
            name=name,
            module=layer,
            first=layer.ln1,
            attention=attention,
            output=attention,
            norm=layer.ln2,
            # Its output is added to the input of the feed-forward.
            last=layer.ffn.dropout_layer,
            sources={
                kind: (attention.qkv, Heads(attention.head_dims, part, 3))
                for part, kind in enumerate(("queries", "keys", "values"))
            },
            # A gated feed-forward has three projections.
            hidden=layer.ffn.w3.in_features * 3 // 2 if gated else layer.ffn.feedforward_channels,
        )
