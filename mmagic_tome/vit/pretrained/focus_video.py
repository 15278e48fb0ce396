# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The image model of :mod:`.focus` as a video model: VideoMAE's structure, every frame's tokens.

No package contains weights of a video model, and random ones merge by colour alone. So the ViT-S/14
is inflated: one frame per token in time, the same position embedding in all frames, no position in
time. It was never trained on video and has lost its class token. It shows which tokens of a clip
are similar to a trained transformer, and nothing about accuracy.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ToMeError
from .focus import PATCH, WIDTH, load_focus_vit


def load_focus_vit_video(
    frames: int = 8, size: int = 112, weights: str | Path | None = None
) -> nn.Module:
    """A ``transformers.VideoMAEModel`` with the weights of :func:`~.focus.load_focus_vit`.

    Args:
        frames (int): of a clip, at least 1. Default 8.
        size (int): side of a frame in pixels, a multiple of 14. Default 112.
        weights: see :func:`~.focus.load_focus_vit`.

    Raises:
        ToMeError: a size that is no multiple of 14, or as for the image model.
    """
    if size < PATCH or size % PATCH:
        raise ToMeError(f"size must be a multiple of {PATCH}, got {size}")
    if frames < 1:
        raise ToMeError(f"frames must be at least 1, got {frames}")
    image_model = load_focus_vit(weights).backbone
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=size,
        patch_size=PATCH,
        num_frames=frames,
        tubelet_size=1,
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
    )
    model = VideoMAEModel(config).eval()
    own = image_model.state_dict()
    state = {
        "embeddings.patch_embeddings.projection.weight": own[
            "embeddings.patch_embeddings.projection.weight"
        ][:, :, None],
        "embeddings.patch_embeddings.projection.bias": own[
            "embeddings.patch_embeddings.projection.bias"
        ],
        "layernorm.weight": own["layernorm.weight"],
        "layernorm.bias": own["layernorm.bias"],
    }
    for index in range(12):
        state.update(_block(own, f"encoder.layer.{index}."))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ToMeError(
            f"this VideoMAEModel is not built as that of transformers 5: {[*missing, *unexpected]}"
        )
    model.embeddings.position_embeddings = _positions(own, size // PATCH).repeat(1, frames, 1)
    return model


def _block(own: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    def of(name: str) -> Tensor:
        return own[prefix + name]

    # A bias on the keys adds the same to all scores of a query, so VideoMAE has none.
    # Layer scales, which it does not have, go into the layers before them.
    attention, outer = of("layer_scale1.lambda1"), of("layer_scale2.lambda1")
    block = {
        "attention.attention.query.weight": of("attention.q_proj.weight"),
        "attention.attention.key.weight": of("attention.k_proj.weight"),
        "attention.attention.value.weight": of("attention.v_proj.weight"),
        "attention.attention.query.bias": of("attention.q_proj.bias"),
        "attention.attention.value.bias": of("attention.v_proj.bias"),
        "attention.output.dense.weight": of("attention.o_proj.weight") * attention[:, None],
        "attention.output.dense.bias": of("attention.o_proj.bias") * attention,
        "intermediate.dense.weight": of("mlp.fc1.weight"),
        "intermediate.dense.bias": of("mlp.fc1.bias"),
        "output.dense.weight": of("mlp.fc2.weight") * outer[:, None],
        "output.dense.bias": of("mlp.fc2.bias") * outer,
    }
    for ours, theirs in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        for kind in ("weight", "bias"):
            block[f"{ours}.{kind}"] = of(f"{theirs}.{kind}")
    return {prefix + name: tensor for name, tensor in block.items()}


def _positions(own: dict[str, Tensor], side: int) -> Tensor:
    """(1, side**2, 384), the image model's embedding, resized as that model resizes it."""
    positions = own["embeddings.position_embeddings"][:, 1:].transpose(1, 2).unflatten(2, (37, 37))
    with torch.no_grad():
        positions = F.interpolate(positions, size=(side, side), mode="bicubic", align_corners=False)
    return positions.flatten(2).transpose(1, 2)
