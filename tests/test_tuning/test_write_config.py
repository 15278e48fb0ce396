# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The config that is written, read again by mmengine."""

import pytest

from mmagic_tome.apis.model_config import load_config, setting_config
from mmagic_tome.tuning.space import Candidate, Merge, Part, Window
from mmagic_tome.tuning.write import base_of, config_text, python_of, write_text

CANDIDATE = Candidate(
    Window(2, 0.1, 0.7),
    Window(3, 0.0, 0.9),
    Merge("attn", (Part(1, 0.5, 0.5, 1.0), Part(2, 0.25, 0.2, 1.0))),
)
NOTES = ["Measured: " + "many words " * 30, 'A "second" one.']


MERGE = Candidate(merge=CANDIDATE.merge)
SKIP = Candidate(CANDIDATE.network)


@pytest.mark.parametrize("replaces", [(), ("tome_cfg",), ("tome_cfg", "cache_cfg")])
@pytest.mark.parametrize("candidate", [CANDIDATE, MERGE, SKIP])
def test_it_says_what_was_found(tmp_path, candidate, replaces):
    pytest.importorskip("mmengine")
    base = tmp_path / "base.py"
    base.write_text(
        "model = dict(type='StableDiffusion')\ncustom_imports = dict(imports=['json'])\n"
        "infer_cfg = dict(steps=50, guidance=3.0)\n"
        + ("tome_cfg = dict(ratio=0.5, sx=4)\n" if "tome_cfg" in replaces else "")
        + ("cache_cfg = dict(region='inner')\n" if "cache_cfg" in replaces else "")
    )
    target = tmp_path / "deeper" / "tuned.py"
    infer = dict(steps=20, size=(64, 32))
    text = config_text(
        base_of(str(base), target), candidate.options(), NOTES, replaces, ["json"], infer
    )
    write_text(target, text)
    config = load_config(target)
    assert setting_config(config) == candidate.setting()
    assert config.model.type == "StableDiffusion"
    assert config.custom_imports["imports"] == ["json", "mmagic_tome"]
    assert dict(config.infer_cfg) == dict(steps=20, guidance=3.0, size=[64, 32])
    lines = target.read_text().splitlines()
    assert max(map(len, lines)) <= 100 and lines[0].startswith("# Measured: many words")
    assert list(target.parent.iterdir()) == [target]


def test_the_base_is_named_from_where_the_config_is(tmp_path):
    config = str(tmp_path / "configs" / "a.py")
    assert base_of(config, tmp_path / "configs" / "b.py") == "./a.py"
    assert base_of(config, tmp_path / "out" / "b.py") == "../configs/a.py"
    assert base_of("mmagic_tome::demo/sd-emoji.py", "x.py") == "mmagic_tome::demo/sd-emoji.py"


def test_python():
    value = {"a": {1: 0.5}, "b": ["x\\y", 'say "z"', None, True]}
    assert eval(python_of(value)) == value
    assert python_of({"steps": 2}) == "dict(steps=2)"
