# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/visualize.py --input`` with tiny models: files and complaints."""

import json
import wave

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine")
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from mmagic_tome.visualization import cli

HEAD = 'custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)\n'
CONFIGS = {
    "image": """
model = dict(type="ToMe", model=dict(type="TimmModel", name="vit_tiny_patch16_224", img_size=64,
             depth=3, embed_dim=24, num_classes=3), r=3)
vit_input = dict(kind="image", size=64, patch=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
""",
    "video": """
model = dict(type="TransformersModel", model="VideoMAEModel", config="VideoMAEConfig",
             image_size=32, patch_size=16, num_frames=4, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=2, intermediate_size=16)
vit_input = dict(kind="video", size=32, patch=16, frames=4, tubelet=2, mean=(0.5, 0.5, 0.5),
                 std=(0.5, 0.5, 0.5))
""",
    "audio": """
model = dict(type="ToMe", model=dict(type="TransformersModel", model="WhisperModel",
             config="WhisperConfig", d_model=16, encoder_layers=2, encoder_attention_heads=2,
             decoder_layers=1, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16),
             r=100)
vit_input = dict(kind="audio")
""",
}

pytestmark = pytest.mark.usefixtures("no_default_scope")


@pytest.fixture
def files(tmp_path):
    """Configs and inputs of every kind."""
    rng = np.random.default_rng(0)
    for kind, text in CONFIGS.items():
        (tmp_path / f"{kind}.py").write_text(HEAD + text)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(6)]
    pictures[0].save(tmp_path / "image.png")
    pictures[0].save(tmp_path / "video.gif", save_all=True, append_images=pictures[1:])
    with wave.open(str(tmp_path / "audio.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes((8000 * rng.standard_normal(8 * 8000)).astype("<i2").tobytes())
    return tmp_path


@pytest.mark.parametrize(
    "kind, suffix, r, tokens",
    [
        ("image", "png", None, [[17, 14], [14, 11], [11, 8]]),
        ("video", "gif", 3, [[8, 5], [5, 3]]),
        ("audio", "wav", None, [[1500, 1400], [1400, 1300]]),
    ],
)
def test_every_kind_gives_a_sheet_and_a_gif(files, kind, suffix, r, tokens):
    out, given = files / "out", str(files / f"{kind}.{suffix}")
    words = [str(files / f"{kind}.py"), "--input", given, "--out", str(out)]
    assert cli.main(words if r is None else [*words, "--r", str(r)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["tokens"] == tokens
    (drawn,) = result["images"]
    assert drawn["input"] == f"{kind}.{suffix}"
    sheet = np.asarray(Image.open(out / drawn["sheet"]).convert("RGB"))
    assert sheet.std() > 10
    with Image.open(out / drawn["gif"]) as gif:
        # One per block; of a clip one per frame.
        assert gif.n_frames == (4 if kind == "video" else len(tokens))


def test_without_token_merging_in_the_config_it_is_added(files):
    text = (files / "image.py").read_text()
    (files / "image.py").write_text(text.replace("r=3", "r=0"))
    words = [str(files / "image.py"), "--input", str(files / "image.png")]
    assert cli.main([*words, "--out", str(files / "a"), "--r", "2"]) == 0
    assert cli.main([*words, "--out", str(files / "b")]) == 2


@pytest.mark.parametrize(
    "config, words, message",
    [
        ("image.py", ["--input", "none.png"], "none.png: no such file"),
        ("image.py", ["--input", "audio.wav"], "is no picture that can be read"),
        ("audio.py", ["--input", "image.png"], "is no WAV file"),
        ("video.py", ["--input", "image.png"], "has 1 frames; this config takes 4"),
        ("image.py", ["--input", "image.png", "--ratio", "0.5"], "--ratio has no meaning"),
        ("image.py", ["--input", "image.png", "--steps", "3"], "--steps has no meaning"),
        ("other.py", ["--input", "image.png"], "with model and vit_input"),
        ("kind.py", ["--input", "image.png"], "kind in vit_input must be one of image, video"),
        ("size.py", ["--input", "image.png"], "vit_input of kind 'image' needs patch"),
        ("image.py", ["--r", "3"], "--r is for vision transformers"),
    ],
)
def test_bad_input_is_one_line(files, monkeypatch, capsys, config, words, message):
    monkeypatch.chdir(files)
    model = HEAD + 'model = dict(type="TimmModel", name="x")\n'
    (files / "other.py").write_text(model)
    (files / "kind.py").write_text(model + 'vit_input = dict(kind="smell")\n')
    (files / "size.py").write_text(model + 'vit_input = dict(kind="image", size=3)\n')
    assert cli.main([config, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (files / "outputs").exists()
