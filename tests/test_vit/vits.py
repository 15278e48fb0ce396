# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Tiny vision transformers with random weights, one of every family."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

LAYERS, WIDTH, HEADS = 4, 32, 2
_SIZE = dict(
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=48,
)
_IMAGE = dict(**_SIZE, image_size=24, patch_size=4)


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_IMAGE, num_labels=5))


def _deit():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return DeiTForImageClassificationWithTeacher(DeiTConfig(**_IMAGE, num_labels=5))


def _clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**_IMAGE, projection_dim=7))


def _siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**_IMAGE))


def _dinov2():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(Dinov2Config(**_IMAGE, mlp_ratio=2, num_labels=5))


def _dinov2_swiglu():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**_IMAGE, mlp_ratio=2, use_swiglu_ffn=True))


def _dinov2_registers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**_IMAGE, mlp_ratio=2, num_register_tokens=3)
    return Dinov2WithRegistersModel(config)


def _videomae():
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        **_SIZE, image_size=16, patch_size=4, num_frames=4, tubelet_size=2, num_labels=5
    )
    return VideoMAEForVideoClassification(config)


def _ast():
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        **_SIZE,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=24,
        num_mel_bins=24,
        num_labels=5,
    )
    return ASTForAudioClassification(config)


def _whisper():
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=50,
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_layers=2,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=36,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperModel(config)


def _timm(**options):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=24,
        patch_size=4,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        mlp_ratio=1.5,
        num_classes=5,
        **options,
    )


def _timm_distilled():
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(
        img_size=24,
        patch_size=4,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=5,
    )


def _mmpretrain(kind="VisionTransformer", **options):
    import mmpretrain.models as library

    arch = dict(embed_dims=WIDTH, num_layers=LAYERS, num_heads=HEADS, feedforward_channels=48)
    backbone = dict(type=kind, arch=arch, img_size=24, patch_size=4, **options)
    distilled = kind != "VisionTransformer"
    head = dict(
        type="DeiTClsHead" if distilled else "VisionTransformerClsHead",
        num_classes=5,
        in_channels=WIDTH,
    )
    if options.get("out_type") == "avg_featmap":
        head["type"] = "LinearClsHead"
    model = library.build_classifier(dict(type="ImageClassifier", backbone=backbone, head=head))
    for module in model.modules():
        if hasattr(module, "drop_prob"):  # numbers of numpy, which dynamo cannot branch on
            module.drop_prob = float(module.drop_prob)
    return model


#: name -> (model, protected tokens, whether the output is unmerged by default)
FAMILIES = {
    "vit": (_vit, 1, False),
    "deit": (_deit, 2, False),
    "clip": (_clip, 1, False),
    "siglip": (_siglip, 0, True),
    "dinov2": (_dinov2, 1, True),
    "dinov2-swiglu": (_dinov2_swiglu, 1, False),
    "dinov2-registers": (_dinov2_registers, 4, False),
    "videomae": (_videomae, 0, True),
    "ast": (_ast, 2, False),
    "whisper": (_whisper, 0, True),
    "timm": (lambda: _timm(), 1, False),
    "timm-options": (
        lambda: _timm(qk_norm=True, init_values=0.3, reg_tokens=2, global_pool="avg"),
        3,
        True,
    ),
    "timm-distilled": (_timm_distilled, 2, False),
}
if importlib.util.find_spec("mmpretrain") is not None:
    FAMILIES |= {
        "mmpretrain": (lambda: _mmpretrain(layer_scale_init_value=0.3), 1, False),
        "mmpretrain-pooled": (lambda: _mmpretrain(out_type="avg_featmap"), 1, True),
        "mmpretrain-distilled": (lambda: _mmpretrain("DistilledVisionTransformer"), 2, False),
    }


def build(name: str, attention: str | None = None) -> nn.Module:
    """A model in eval mode whose weights are large enough for layers to matter."""
    torch.manual_seed(0)
    model = FAMILIES[name][0]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or "token" in key:
                parameter.normal_(std=0.25)
    if attention is not None:
        if name.startswith("timm"):
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = attention == "sdpa"
        elif name.startswith("mmpretrain"):
            if attention == "eager":
                from mmpretrain.models.utils import attention as library

                for module in model.modules():
                    if hasattr(module, "scaled_dot_product_attention"):
                        eager = library.scaled_dot_product_attention_pyimpl
                        module.scaled_dot_product_attention = eager
        else:
            model.set_attn_implementation(attention)
    return model


def inputs(name: str, redundant: bool = False, batch: int = 2, seed: int = 1) -> dict:
    """Arguments of a call; ``redundant``: every patch of a sample is the same."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "whisper":
        x = randn(batch, 8, 1).expand(-1, -1, 72) if redundant else randn(batch, 8, 72)
        return {"input_features": x.contiguous(), "decoder_input_ids": torch.ones(batch, 3).long()}
    if name == "ast":
        x = randn(batch, 4, 4).repeat(1, 6, 6) if redundant else randn(batch, 24, 24)
        return {"input_values": x}
    if name == "videomae":
        x = (
            randn(batch, 1, 3, 4, 4).repeat(1, 4, 1, 4, 4)
            if redundant
            else randn(batch, 4, 3, 16, 16)
        )
        return {"pixel_values": x}
    x = randn(batch, 3, 4, 4).repeat(1, 1, 6, 6) if redundant else randn(batch, 3, 24, 24)
    if name.startswith("mmpretrain"):
        return {"inputs": x}
    return {"x" if name.startswith("timm") else "pixel_values": x}


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
