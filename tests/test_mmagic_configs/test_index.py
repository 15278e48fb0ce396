# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The configs that come with the package: they can be read, and the index lists them."""

from pathlib import Path

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


def test_every_config_is_in_the_index():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    assert sorted(index) == sorted(
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/metafile.yml")
    )
    listed = []
    for metafile in index:
        content = yaml.safe_load((ROOT / metafile).read_text())
        collections = {collection["Name"] for collection in content["Collections"]}
        for collection in content["Collections"]:
            assert (ROOT / collection["README"]).is_file()
        for model in content["Models"]:
            assert model["In Collection"] in collections
            listed.append(model["Config"])
    assert sorted(listed) == CONFIGS
