# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The evaluation config of each folder runs as it is, with tiny weights, few steps and an input."""

import math
from pathlib import Path

import pytest

pytest.importorskip("mmagic")

import mmagic_hub
from mmengine import Config
from mmengine.runner import Runner

OURS = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(file.relative_to(OURS).as_posix() for file in OURS.glob("[a-z]*/*_eval.py"))
QUICK = ("controlnet", "dreambooth")


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith(QUICK) else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGS
        if not name.startswith("demo")  # tests/test_mmagic/test_entry.py runs it
    ],
)
def test_eval_config(name, hub, tmp_path):
    config = mmagic_hub.shrink(Config.fromfile(str(OURS / name)), hub)
    image = str(tmp_path / "image.png")
    mmagic_hub.an_image().save(image)
    given = config.get("infer_cfg") or {}
    inputs = {key: [image] for key in given if key in ("controls", "references")}
    config.infer_cfg = dict(given, steps=2, size=(64, 64), **inputs)
    if config.model.type == "AnimateDiff":
        config.infer_cfg.frames = 2
    config.test_dataloader.dataset.prompts = config.test_dataloader.dataset.prompts[:2]
    config.work_dir = str(tmp_path / "work")
    config.experiment_name = Path(name).stem
    runner = Runner.from_cfg(config)
    import tiny

    tiny.randomise(runner.model)
    found = runner.test()
    relative = ("psnr", "ssim", "latent_error")
    names = {f"merging/{key}" for key in (*relative, "seconds")}
    assert set(found) == {"baseline/seconds", *names}
    assert 0 < found["merging/psnr"] < 60 and 0 < found["merging/latent_error"] < 2
    assert all(math.isfinite(value) for value in found.values())
    log = next(tmp_path.rglob("*.log")).read_text()
    assert "token merging in" in log
    assert len(list(tmp_path.rglob("vis_image/test_*.png"))) == 2


def test_every_family_has_one():
    folders = {name.partition("/")[0] for name in CONFIGS}
    assert folders == {"demo", *mmagic_hub.FOLDERS} - {"controlnet_animation"}
