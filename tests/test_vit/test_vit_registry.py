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

TIMM = dict(
    type="TimmModel", name="vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=24, num_classes=3
)


@pytest.mark.parametrize("r, removed", [(2, [2, 2, 2]), ((2, -1.0), [4, 2, 0]), ([1], [1, 0, 0])])
def test_a_config_builds_a_merged_model(r, removed):
    config = Config(dict(model=dict(type="ToMe", model=TIMM, r=r, metric="values")))
    model = MODELS.build(config.model)
    assert type(model).__module__ == "timm.models.vision_transformer"
    model(torch.randn(1, 3, 64, 64))
    handle = get_vit_handle(model)
    assert [before - after for before, after in handle.tokens] == removed
    assert handle.config.metric == "values"


def test_inflected_schedules_survive_formats_without_tuples():
    model = MODELS.build(dict(type="ToMe", model=dict(TIMM), r=[2, -1.0]))
    assert get_vit_handle(model).r == (2, -1.0)


def test_models_of_transformers_by_name():
    options = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    inner = dict(type="TransformersModel", model="ViTModel", config="ViTConfig", **options)
    model = MODELS.build(dict(type="ToMe", model=inner, target_speedup=1.0))
    assert type(model).__name__ == "ViTModel" and not model.training
    with pytest.raises(ToMeError, match="has no 'NoModel'"):
        MODELS.build(dict(inner, model="NoModel"))


def test_wrong_configs():
    with pytest.raises(ToMeError, match="needs the model to build"):
        MODELS.build(dict(type="ToMe", model=None, r=1))
    with pytest.raises(ToMeError, match="has no option 'ratio'"):
        MODELS.build(dict(type="ToMe", model=dict(TIMM), ratio=0.5))


def test_backbone_of_mmpretrain():
    pytest.importorskip("mmpretrain")
    from mmpretrain.models import build_classifier
    from mmpretrain.structures import DataSample

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
    with torch.no_grad():
        assert not torch.equal(merged(x)[0], plain(x)[0])
        handle = get_vit_handle(merged)
        assert [after for _, after in handle.tokens] == [33, 29, 25]
        handle.r = 0
        assert torch.equal(merged(x)[0], plain(x)[0])
    # It trains as any other classifier.
    handle.r = 4
    samples = [DataSample().set_gt_label(label) for label in (1, 3)]
    merged.loss(x, samples)["loss"].backward()
    gradients = [p.grad for p in merged.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert handle.tokens[-1][1] == 25
    with pytest.raises(ToMeError, match="tokens of blocks in the middle"):
        build_classifier(
            {
                **config,
                "backbone": dict(
                    type="ToMe", model=dict(backbone, out_type="featmap", out_indices=(0, 2)), r=4
                ),
            }
        )


def test_mmpretrain_without_a_supported_forward():
    pytest.importorskip("mmpretrain")
    from mmpretrain.registry import MODELS as REGISTRY

    with pytest.raises(ToMeError, match="MAEViT of mmpretrain has a forward of its own"):
        REGISTRY.build(
            dict(
                type="ToMe",
                model=dict(type="MAEViT", arch="deit-tiny", img_size=32, patch_size=16),
                r=1,
            )
        )


CONFIGS = sorted(
    path
    for folder in ("vit", "video")
    for path in (Path(__file__).parents[2] / "configs" / folder).glob("*.py")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_package(path, monkeypatch):
    """Every config builds, with small models in place of large and of packaged ones."""
    config = Config.fromfile(path)
    model = config.model
    inner = model.model if model.type == "ToMe" else model
    tokens = {
        "vit-s14-focus_tome-r13": (257, 1, 101),
        "vit-s14-focus-518_tome-r75": (1370, 1, 470),
        "vit-large-p16_tome-r8_timm": (197, 1, 7),
        "videomae-base_tome-r65": (1568, 0, 788),
        "videomae-large_tome-r65": (1568, 0, 37),
    }
    if path.stem in tokens:
        from mmagic_tome.vit.schedules import removed_per_block, tokens_per_block

        depth = {
            "vit-large-p16_tome-r8_timm": 24,
            "videomae-large_tome-r65": 24,
        }
        if inner.get("num_hidden_layers"):
            assert inner.num_hidden_layers == depth[path.stem]
        before, prefix, after = tokens[path.stem]
        removed = removed_per_block(model.r, depth.get(path.stem, 12))
        assert tokens_per_block(removed, before, prefix)[-1][1] == after
    else:
        assert path.stem in ("vit-s14-focus", "vit-base-p16_tome-r13_mmpretrain")
    if model.type == "ImageClassifier":
        pytest.importorskip("mmpretrain")
        from mmpretrain.models import build_classifier

        arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=48)
        model.backbone.model.arch, model.head.in_channels = arch, 32
        built = build_classifier(model)
        assert get_vit_handle(built).r == 13
    elif inner.type in ("TimmModel", "TransformersModel"):
        small = dict(TimmModel=dict(embed_dim=32, depth=2, num_heads=2))
        tiny = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
        inner.update(small.get(inner.type, {**tiny, "intermediate_size": 32}))
        built = MODELS.build(model)
        assert get_vit_handle(built).r == model.r
    else:
        assert inner.type == "FocusViT" and MODELS.get(inner.type) is not None
