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
def test_configs_can_be_read_and_merge_if_their_name_says_so(name, monkeypatch):
    monkeypatch.setenv("SD_WEIGHTS", "/some/folder")
    config = load_config(ROOT / name)
    assert config.get("default_scope", "mmagic") == "mmagic"
    assert setting_of(config).baseline != ("_tome-" in name)
    if name.endswith("_local.py"):
        sources = (config.model.unet.from_pretrained, config.model.tokenizer)
        assert sources == ("/some/folder", "/some/folder")


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
            # The same with other weights, and with an evaluation.
            stem = name.stem.removesuffix("_local").removesuffix("_eval")
            row = re.search(rf"^\| {stem} \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", page, re.M)
            baseline, merged = map(float, row.groups())
            assert 0 < merged < baseline
            assert model["Results"][0]["Metrics"] == {
                "TFLOP per step, baseline": baseline,
                "TFLOP per step, merged": merged,
            }
    assert sorted(listed) == CONFIGS
