# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers in configs."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from mmengine.config import Config
from mmengine.registry import MODELS

from mmagic_tome import ToMeError
from mmagic_tome.vit import get_vit_handle
from mmagic_tome.vit.config import removed_per_block, tokens_per_block

TIMM = dict(
    type="TimmModel", name="vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=24, num_classes=3
)


# YAML and JSON have no tuples.
@pytest.mark.parametrize("r, removed", [(2, [2, 2, 2]), ([2, -1.0], [4, 2, 0]), ([1], [1, 0, 0])])
def test_a_config_builds_a_merged_model(r, removed):
    config = Config(dict(model=dict(type="ToMe", model=TIMM, r=r, metric="values")))
    model = MODELS.build(config.model)
    assert type(model).__module__ == "timm.models.vision_transformer"
    model(torch.randn(1, 3, 64, 64))
    handle = get_vit_handle(model)
    assert [before - after for before, after in handle.tokens] == removed
    assert handle.config.metric == "values"


def test_models_of_transformers_by_name_and_wrong_configs():
    options = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    inner = dict(type="TransformersModel", model="ViTModel", config="ViTConfig", **options)
    model = MODELS.build(dict(type="ToMe", model=inner, target_speedup=1.0))
    assert type(model).__name__ == "ViTModel" and not model.training
    for wrong, said in (
        (dict(type="ToMe", model=None, r=1), "needs the model to build"),
        (dict(type="ToMe", model=dict(TIMM), ratio=0.5), "has no option 'ratio'"),
    ):
        with pytest.raises(ToMeError, match=said):
            MODELS.build(wrong)


def test_backbone_of_mmpretrain():
    pytest.importorskip("mmpretrain")
    from mmpretrain.models import build_classifier
    from mmpretrain.registry import MODELS as REGISTRY

    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=48)
    backbone = dict(type="VisionTransformer", arch=arch, img_size=24, patch_size=4)
    loss = dict(type="CrossEntropyLoss")
    head = dict(type="VisionTransformerClsHead", num_classes=5, in_channels=32, loss=loss)
    config = dict(type="ImageClassifier", backbone=backbone, head=head)
    plain = build_classifier(config)
    merged = build_classifier({**config, "backbone": dict(type="ToMe", model=backbone, r=4)})
    assert type(merged.backbone) is type(plain.backbone)
    # A checkpoint of the one is a checkpoint of the other.
    merged.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 24, 24)
    assert not torch.equal(merged(x)[0], plain(x)[0])
    handle = get_vit_handle(merged)
    assert [after for _, after in handle.tokens] == [33, 29, 25]
    handle.r = 0
    assert torch.equal(merged(x)[0], plain(x)[0])
    for inner, said in (
        (dict(backbone, out_type="featmap", out_indices=(0, 2)), "tokens of blocks in the middle"),
        (
            dict(type="MAEViT", arch="deit-tiny", img_size=32, patch_size=16),
            "MAEViT of mmpretrain has a forward of its own",
        ),
    ):
        with pytest.raises(ToMeError, match=said):
            REGISTRY.build(dict(type="ToMe", model=inner, r=4))


CONFIGS = {
    path.stem: path
    for folder in ("vit", "video")
    for path in (Path(__file__).parents[2] / "configs" / folder).glob("*.py")
}
# Config -> blocks, tokens before the first, protected ones, tokens after the last.
TOKENS = {
    "vit-s14-focus_tome-r13": (12, 257, 1, 101),
    "vit-s14-focus-518_tome-r75": (12, 1370, 1, 470),
    "vit-large-p16_tome-r8_timm": (24, 197, 1, 7),
    "videomae-base_tome-r65": (12, 1568, 0, 788),
    "videomae-large_tome-r65": (24, 1568, 0, 37),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_configs_of_the_package(name):
    """Every config builds, with small models in place of large and of packaged ones."""
    model = Config.fromfile(CONFIGS[name]).model
    inner = model.model if model.type == "ToMe" else model
    if name in TOKENS:
        depth, before, prefix, after = TOKENS[name]
        assert inner.get("num_hidden_layers", depth) == depth
        counts = tokens_per_block(removed_per_block(model.r, depth), before, prefix)
        assert counts[-1][1] == after
    else:
        assert name in ("vit-s14-focus", "vit-base-p16_tome-r13_mmpretrain")
    if model.type == "ImageClassifier":
        pytest.importorskip("mmpretrain")
        from mmpretrain.models import build_classifier

        arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=48)
        model.backbone.model.arch, model.head.in_channels = arch, 32
        assert get_vit_handle(build_classifier(model)).r == 13
    elif inner.type == "FocusViT":
        assert MODELS.get(inner.type) is not None
    else:
        inner.update(
            dict(embed_dim=32, depth=2, num_heads=2)
            if inner.type == "TimmModel"
            else dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
        )
        assert get_vit_handle(MODELS.build(model)).r == model.r
