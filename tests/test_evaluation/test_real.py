# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Real pictures from a folder."""

import numpy as np
import pytest
from PIL import Image

from mmagic_tome import ToMeError
from mmagic_tome.evaluation.real import find_real, fit


def test_unreadable_pictures_are_counted(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    real = find_real(tmp_path, (8, 8))
    assert [p.name for p in real.files] == ["a.png"]
    assert real.notes == ["1 of 2 real pictures cannot be read: b.jpg"]
    assert real.picture(0).shape == (8, 8, 3)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ToMeError, match="1 files that cannot be read"):
        find_real(tmp_path, (8, 8))
    with pytest.raises(ToMeError, match="is not a folder"):
        find_real(tmp_path / "nowhere", (8, 8))


def test_so_many_of_every_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    real = find_real(tmp_path, (8, 8), per_class=2)
    assert [p.name for p in real.files] == ["0.png", "1.png"] * 2
    assert real.digest != find_real(tmp_path, (8, 8)).digest
    with pytest.raises(ToMeError, match="2 of 2 sub-folders"):
        find_real(tmp_path, (8, 8), per_class=4)


def test_the_centre_is_taken_and_transparent_is_white():
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    assert (np.asarray(fit(Image.fromarray(pixels), (10, 10))) == 200).all()
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (np.asarray(fit(clear, (4, 4))) == 255).all()
