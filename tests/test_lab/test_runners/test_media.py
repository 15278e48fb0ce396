# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Files of images and clips."""

import json

import numpy as np
import pytest
from PIL import Image, ImageSequence

from mmagic_tome import ToMeError
from mmagic_tome.lab.runners import media

REDS = range(0, 240, 40)
FRAMES = [Image.new("RGB", (16, 8), (red, 0, 0)) for red in REDS]


@pytest.fixture(autouse=True)
def _notes_again():
    media._writes_mp4.cache_clear()


def test_a_clip_is_a_gif_and_where_that_can_be_an_mp4(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(media.importlib.util, "find_spec", lambda name: None)
    path = media.save_media(tmp_path / "clip", FRAMES, fps=10, text=dict(seed=7))
    media.save_media(tmp_path / "clip", FRAMES, fps=10, text=dict(seed=7))
    gif = Image.open(path)
    assert json.loads(gif.info["comment"]) == {"seed": "7"}
    assert gif.info["duration"] == 100
    reds = [frame.convert("RGB").getpixel((0, 0))[0] for frame in ImageSequence.Iterator(gif)]
    assert np.allclose(reds, REDS, atol=3)
    assert [one.name for one in tmp_path.iterdir()] == ["clip.gif"]
    assert caplog.text.count("pip install imageio-ffmpeg") == 1


def test_an_mp4_has_the_frames(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    import imageio

    media.save_media(tmp_path / "clip", [frame.resize((64, 48)) for frame in FRAMES], fps=12)
    reader = imageio.get_reader(tmp_path / "clip.mp4")
    assert reader.get_meta_data()["fps"] == 12
    assert np.allclose([frame[..., 0].mean() for frame in reader], REDS, atol=6)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ToMeError, match=r"cannot read image .*text.png"):
        media.load_image(tmp_path / "text.png")
    with pytest.raises(ToMeError, match=r"image .*nothing.png does not exist"):
        media.load_image(tmp_path / "nothing.png")
    gray = Image.new("L", (4, 4), 9)
    assert media.load_image(gray).getpixel((0, 0)) == (9, 9, 9)


def test_a_strip_has_the_first_and_the_last_frame():
    strip = media.frame_strip(FRAMES, count=3)
    assert strip.size == (48, 8)
    assert [strip.getpixel((16 * column, 0))[0] for column in range(3)] == [0, 80, 200]
    assert media.frame_strip(FRAMES[0]) is FRAMES[0]
    assert media.frame_strip(FRAMES[:2], count=4).size == (32, 8)
