# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The folder of an evaluation: atomic, one process at a time, loud about what differs."""

import errno
import json

import numpy as np
import pytest
from PIL import Image

from mmagic_tome import ToMeError
from mmagic_tome.evaluation.store import RunFolder, differences

BASIS = {"steps": 4, "versions": {"torch": "1"}, "size": (64, 64)}
SPECS = {"dense": {"kind": "dense"}}


def picture(seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def save(folder, number=0, contender="dense", seed=0):
    latents = np.full((4, 1, 1), number, dtype=np.float32)
    folder.save_picture(contender, number, picture(seed), latents, {"finite": True}, {"a": "b"})


def test_goes_on_with_the_same_and_adds_contenders(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(BASIS, SPECS, overwrite=False)
    save(folder)
    manifest = folder.open(BASIS, {**SPECS, "ratio 0.5": {"kind": "tome"}}, overwrite=False)
    assert list(manifest["contenders"]) == ["dense", "ratio 0.5"]
    # JSON knows no tuples: what comes back is the same all the same.
    assert differences(manifest, {**BASIS, "size": [64, 64]}, SPECS) == []
    assert differences(manifest, BASIS, SPECS) == []
    assert folder.has_picture("dense", 0) and not folder.has_picture("dense", 1)
    assert np.array_equal(np.asarray(folder.picture("dense", 0)), np.asarray(picture()))
    assert folder.latents("dense", 0).shape == (4, 1, 1)


def test_what_differs_is_named_and_nothing_is_lost(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(BASIS, SPECS, overwrite=False)
    save(folder)
    other = {**BASIS, "steps": 5, "versions": {"torch": "2"}}
    with pytest.raises(ToMeError) as found:
        folder.open(other, {"dense": {"kind": "other"}}, overwrite=False)
    text = str(found.value)
    for part in ("steps: 4, now 5", 'versions.torch: "1", now "2"', "dense.kind", "--overwrite"):
        assert part in text
    assert folder.has_picture("dense", 0)
    (folder.path / "mine.txt").write_text("kept")
    folder.open(other, SPECS, overwrite=True)
    assert not folder.has_picture("dense", 0)
    assert (folder.path / "mine.txt").is_file()


def test_a_contender_that_became_another_is_replaced_alone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    specs = {**SPECS, "My half": {"kind": "tome", "tome_cfg": {"sx": 2}}}
    folder.open(BASIS, specs, overwrite=False)
    save(folder), save(folder, contender="my-half")
    other = {**SPECS, "My half": {"kind": "tome", "tome_cfg": {"sx": 4}}}
    with pytest.raises(ToMeError, match=r"My half\.tome_cfg\.sx: 2, now 4"):
        folder.open(BASIS, other, overwrite=False)
    manifest = folder.open(BASIS, other, overwrite=True)
    assert manifest["contenders"] == other
    assert folder.has_picture("dense", 0) and not folder.has_picture("my-half", 0)


def test_a_picture_counts_when_its_record_is_there(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        # The record is written with json; the PNG before it is whole by then.
        patch.setattr(json, "dumps", full)
        with pytest.raises(ToMeError, match=r"No space left on device.*run the same command"):
            save(folder)
    assert not folder.has_picture("dense", 0)
    assert not list(folder.path.rglob("*.part*"))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(ToMeError, match="whole"):
            save(folder, 1)
    assert not list(folder.path.rglob("*1.png"))
    save(folder)
    assert folder.has_picture("dense", 0)


def test_a_changed_picture_is_noticed(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder)
    picture(1).save(tmp_path / "pictures" / "dense" / "000000.png")
    with pytest.raises(ToMeError, match=r"000000\.png was changed"):
        folder.picture("dense", 0)
    (tmp_path / "pictures" / "dense" / "000000.png").write_bytes(b"no picture")
    with pytest.raises(ToMeError, match="cannot read"):
        folder.picture("dense", 0)


def test_measures_belong_to_what_they_were_computed_from(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.measure("psnr", "a", 0, "key") is None
    folder.save_measure("psnr", "a", 0, "key", {"values": np.arange(3)})
    assert folder.measure("psnr", "a", 0, "key")["values"].tolist() == [0, 1, 2]
    assert folder.measure("psnr", "a", 0, "other") is None


def test_one_process_at_a_time(tmp_path):
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(ToMeError, match="another evaluation is running"),
        RunFolder(tmp_path).locked(),
    ):
        pass
    with RunFolder(tmp_path).locked():  # and it is free again
        pass


def test_dense_pictures_of_another_folder(tmp_path):
    first, second = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    with pytest.raises(ToMeError, match="holds no evaluation"):
        second.adopt_dense(first, BASIS, SPECS["dense"], range(3))
    first.open(BASIS, SPECS, overwrite=False)
    save(first, 0), save(first, 2)
    second.open(BASIS, SPECS, overwrite=False)
    assert second.adopt_dense(first, BASIS, SPECS["dense"], range(3)) == 2
    assert [second.has_picture("dense", n) for n in range(3)] == [True, False, True]
    assert second.adopt_dense(first, BASIS, SPECS["dense"], range(3)) == 0
    with pytest.raises(ToMeError, match="do not fit: they differ in steps: 4, now 9"):
        second.adopt_dense(first, {**BASIS, "steps": 9}, SPECS["dense"], range(3))


def test_pictures_without_a_manifest_are_not_gone_on_with(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder)
    with pytest.raises(ToMeError, match="no manifest"):
        folder.open(BASIS, SPECS, overwrite=False)
