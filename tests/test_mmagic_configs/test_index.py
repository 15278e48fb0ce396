# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The configs that come with the package: they can be read, and the index and pages list them."""

import re
from pathlib import Path

import mmagic_hub
import pytest
import yaml

from mmagic_tome.lab.runners.mmagic_source import load_config, setting_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/[a-z]*/*.py"))
# Those of vision transformers have a test of their own, in test_vit/test_vit_registry.py.
DENOISERS = [name for name in CONFIGS if name.split("/")[1] not in ("vit", "video")]


@pytest.mark.parametrize("name", DENOISERS)
def test_configs_can_be_read_and_do_what_their_name_says(name, monkeypatch):
    monkeypatch.setenv("SD_WEIGHTS", "/some/folder")
    monkeypatch.setenv("SD_INPAINT_WEIGHTS", "/some/folder")
    config = load_config(ROOT / name)
    assert config.get("default_scope", "mmagic") == "mmagic"
    setting = setting_of(config)
    assert setting.baseline != ("_tome-" in name or "_cache-" in name)
    if "_cache-" in name:
        assert setting.cache[0].tolerance == 0.02 and (setting.tome is None) != ("_tome-" in name)
    if name.split("/")[1] in mmagic_hub.FOLDERS and "_xl" not in name and "animation" not in name:
        assert config.model.tokenizer == "/some/folder"
        assert config.model.vae.get("from_pretrained", "/some/folder") == "/some/folder"
    assert "runwayml" not in str(config.get("model")), "this name has left the hub"


def test_every_algorithm_has_the_settings_that_are_advised():
    for folder in {*mmagic_hub.FOLDERS} - {"controlnet_animation"}:
        names = [path.stem for path in (ROOT / "configs" / folder).glob("*.py")]
        (stem,) = {name[: -len("_eval")] for name in names if name.endswith("_eval")}
        plain = stem.removesuffix("_tome-5e-1")
        assert {f"{plain}_cache-balanced", stem, f"{stem}_cache-balanced"} <= set(names)


def test_every_config_is_in_the_index_and_measured_in_its_page():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    assert sorted(index) == sorted(
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/metafile.yml")
    )
    listed = []
    for metafile in index:
        content = yaml.safe_load((ROOT / metafile).read_text())
        (collection,) = content["Collections"]
        page = (ROOT / collection["README"]).read_text("utf-8")
        of_mmagic = metafile.split("/")[1] in mmagic_hub.FOLDERS
        if of_mmagic:  # the method by its paper, and how to use it
            assert re.search(r"^> \[.*\]\(https://arxiv.org/abs/", page, re.M)
            assert "## Usage" in page
        for model in content["Models"]:
            name = Path(model["Config"])
            listed.append(name.as_posix())
            assert model["In Collection"] == collection["Name"]
            if not of_mmagic:
                continue
            assert model["Name"] == name.stem and f"]({name.name})" in page
            if "_cache-" in name.stem:  # operations depend on the run
                assert model["Results"][0]["Metrics"] == {}
                continue
            stem = name.stem.removesuffix("_eval")
            row = re.search(rf"^\| {stem} \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", page, re.M)
            baseline, merged = map(float, row.groups())
            assert 0 < merged < baseline
            assert model["Results"][0]["Metrics"] == {
                "TFLOP per step, baseline": baseline,
                "TFLOP per step, merged": merged,
            }
    assert sorted(listed) == CONFIGS
