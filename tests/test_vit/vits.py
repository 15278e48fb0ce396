# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Tiny vision transformers with random weights, one of every family."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("timm")

LAYERS, WIDTH, HEADS = 4, 32, 2
_SIZE = dict(
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=48,
)
_IMAGE = dict(**_SIZE, image_size=24, patch_size=4)


def _transformers(model, **options):
    import transformers

    config = getattr(transformers, re.split("Model|For", model)[0] + "Config")
    return getattr(transformers, model)(config(**{**_IMAGE, "num_labels": 5, **options}))


def _whisper():
    encoder = dict(encoder_layers=LAYERS, encoder_attention_heads=HEADS, encoder_ffn_dim=48)
    decoder = dict(decoder_layers=2, decoder_attention_heads=HEADS, decoder_ffn_dim=48)
    sizes = dict(d_model=WIDTH, num_mel_bins=8, max_source_positions=36, max_target_positions=16)
    tokens = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    start = dict(decoder_start_token_id=1)
    return _transformers("WhisperModel", **encoder, **decoder, **sizes, **tokens, **start)


def tiny_timm(distilled=False, **options):
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = dict(img_size=24, patch_size=4, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS)
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    return kind(**sizes, mlp_ratio=1.5, num_classes=5, **options).eval()


def _mmpretrain(kind="VisionTransformer", head="VisionTransformerClsHead", **options):
    import mmpretrain.models as library

    arch = dict(embed_dims=WIDTH, num_layers=LAYERS, num_heads=HEADS, feedforward_channels=48)
    backbone = dict(type=kind, arch=arch, img_size=24, patch_size=4, **options)
    head = dict(type=head, num_classes=5, in_channels=WIDTH)
    model = library.build_classifier(dict(type="ImageClassifier", backbone=backbone, head=head))
    for module in model.modules():
        if hasattr(module, "drop_prob"):  # numbers of numpy, which dynamo cannot branch on
            module.drop_prob = float(module.drop_prob)
    return model


_MLP = dict(mlp_ratio=2)
_CLIP_OF_IMAGES = dict(image_size=16, num_frames=4, tubelet_size=2)
_SPECTROGRAM = dict(frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=24)
_CLASS = "ForImageClassification"
_OPTIONS = dict(qk_norm=True, init_values=0.3, reg_tokens=2, global_pool="avg")

#: name -> (model, protected tokens, whether the output is unmerged by default)
FAMILIES = {
    "vit": (lambda: _transformers("ViT" + _CLASS), 1, False),
    "deit": (lambda: _transformers(f"DeiT{_CLASS}WithTeacher"), 2, False),
    "clip": (lambda: _transformers("CLIPVisionModelWithProjection", projection_dim=7), 1, False),
    "siglip": (lambda: _transformers("SiglipVisionModel"), 0, True),
    "dinov2": (lambda: _transformers("Dinov2" + _CLASS, **_MLP), 1, True),
    "dinov2-swiglu": (lambda: _transformers("Dinov2Model", use_swiglu_ffn=True, **_MLP), 1, False),
    "dinov2-registers": (
        lambda: _transformers("Dinov2WithRegistersModel", num_register_tokens=3, **_MLP),
        4,
        False,
    ),
    "videomae": (
        lambda: _transformers("VideoMAEForVideoClassification", **_CLIP_OF_IMAGES),
        0,
        True,
    ),
    "ast": (lambda: _transformers("ASTForAudioClassification", **_SPECTROGRAM), 2, False),
    "whisper": (_whisper, 0, True),
    "timm": (tiny_timm, 1, False),
    "timm-options": (lambda: tiny_timm(**_OPTIONS), 3, True),
    "timm-distilled": (lambda: tiny_timm(distilled=True), 2, False),
}
if importlib.util.find_spec("mmpretrain") is not None:
    _POOLED = dict(head="LinearClsHead", out_type="avg_featmap")
    _DISTILLED = ("DistilledVisionTransformer", "DeiTClsHead")
    FAMILIES |= {
        "mmpretrain": (lambda: _mmpretrain(layer_scale_init_value=0.3), 1, False),
        "mmpretrain-pooled": (lambda: _mmpretrain(**_POOLED), 1, True),
        "mmpretrain-distilled": (lambda: _mmpretrain(*_DISTILLED), 2, False),
    }

NAMES = sorted(FAMILIES)
#: One of every way to give a bias to the attention.
BIASES = [name for name in ("vit", "timm", "videomae", "mmpretrain") if name in FAMILIES]


def build(name: str, attention: str | None = None) -> nn.Module:
    """A model in eval mode whose weights are large enough for layers to matter."""
    torch.manual_seed(0)
    model = FAMILIES[name][0]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or "token" in key:
                parameter.normal_(std=0.25)
    if attention is None:
        return model
    if not name.startswith(("timm", "mmpretrain")):
        model.set_attn_implementation(attention)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "sdpa"
        if attention == "eager" and hasattr(module, "scaled_dot_product_attention"):
            from mmpretrain.models.utils import attention as library

            module.scaled_dot_product_attention = library.scaled_dot_product_attention_pyimpl
    return model


def inputs(name: str, redundant: bool = False, batch: int = 2, seed: int = 1) -> dict:
    """Arguments of a call; ``redundant``: every patch of a sample is the same."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "whisper":
        x = randn(batch, 8, 1).expand(-1, -1, 72) if redundant else randn(batch, 8, 72)
        return {"input_features": x.contiguous(), "decoder_input_ids": torch.ones(batch, 3).long()}
    # A patch, and how often it is repeated along each axis.
    patch, times = (3, 4, 4), (1, 6, 6)
    if name == "ast":
        patch, times = (4, 4), (6, 6)
    elif name == "videomae":
        patch, times = (1, 3, 4, 4), (4, 1, 4, 4)
    whole = [size * count for size, count in zip(patch, times)]
    x = randn(batch, *patch).repeat(1, *times) if redundant else randn(batch, *whole)
    keys = {"ast": "input_values", "timm": "x", "mmpretrain": "inputs"}
    return {keys.get(name.partition("-")[0], "pixel_values"): x}


def forget_positions(model: nn.Module) -> None:
    """Make patches with the same content the same token, wherever they are."""
    done = 0
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            names = ("position_embed", "pos_embed", "embed_positions")
            if any(name in key for name in names) and "decoder" not in key:
                value.zero_()
                done += value.is_floating_point()
    for module in model.modules():  # VideoMAE's are neither parameter nor buffer
        if torch.is_tensor(vars(module).get("position_embeddings")):
            module.position_embeddings = torch.zeros_like(module.position_embeddings)
            done += 1
    assert done


def result(model: nn.Module, arguments: dict) -> torch.Tensor:
    """What a user of the model reads."""
    output = model(**arguments)
    if isinstance(output, tuple):  # of mmpretrain's classifiers
        (output,) = output
        output = output if torch.is_tensor(output) else torch.cat(output, 1)
    if torch.is_tensor(output):
        return output
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    raise AssertionError(list(output))
