# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/visualize.py`` with a random model: files and complaints."""

import functools
import json

import pytest
from PIL import Image
from tiny import tiny_config, write_config

from mmagic_tome.visualization import cli

pytest.importorskip("mmagic", reason="the command runs MMagic models")


@pytest.fixture(scope="module")
def config(sd_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tome.py"
    return write_config(path, tiny_config(folder=sd_folder), tome_cfg=dict(ratio=0.5))


@pytest.fixture
def run(call_command):
    return functools.partial(call_command, cli.main)


def test_all_pictures(run, config, tmp_path):
    quick = ["--size", "64", "--steps", "4", "--device", "cpu", "--columns", "2"]
    code, _, err = run(config, "--prompt", "a cat", "dog", "--out", tmp_path / "maps", *quick)
    assert code == 0, err
    folder = tmp_path / "maps"
    names = {path.name for path in folder.iterdir()}
    ends = (".png", "_dense.png", "_merge.png", "_merge.gif", "_error.png")
    expected = {f"{stem}{end}" for stem in ("0000_a-cat", "0001_dog") for end in ends}
    assert names == expected | {"cost.png", "result.json"}
    with Image.open(folder / "0000_a-cat_merge.gif") as gif:
        assert gif.n_frames == 4
    found = json.loads((folder / "result.json").read_text())
    assert [image["prompt"] for image in found["images"]] == ["a cat", "dog"]
    assert found["cost_ms"] and all(row["kept"] == 32 for row in found["cost_ms"])
    assert found["token_merging"]["ratio"] == 0.5
    assert found["environment"]["versions"]["torch"]
    # The same again, of one block, beside the first.
    code, out, _ = run(
        *(config, "--prompt", "dog", "--out", folder, "--block", "down_blocks.0", *quick)
    )
    assert code == 0 and "maps-2" in out
    heights = []
    for path in (tmp_path / "maps-2" / "0000_dog_merge.png", folder / "0001_dog_merge.png"):
        with Image.open(path) as sheet:
            heights.append(sheet.height)
    assert heights[0] < heights[1]
    # Another prompt in place of the second run leaves nothing of it.
    last = tmp_path / "maps-2"
    code, _, _ = run(config, "--prompt", "cat", "--out", last, "--overwrite", *quick)
    assert code == 0 and not list(last.glob("*dog*")) and len(list(last.iterdir())) == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.py"], "does not exist"),
        (["{config}"], "no prompts"),
        (["{config}", "--prompt", " "], "empty"),
        (["{config}", "--prompt", "a", "--ratio", "0"], "nothing to draw"),
        (["{config}", "--prompt", "a", "--ratio", "0.9"], "0.75"),
        (["{config}", "--prompt", "a", "--size", "63"], "nearest"),
        (["{config}", "--prompt", "a", "--columns", "0"], "at least 1"),
        (["{config}", "--prompt", "a", "--out", "/dev/null/x"], "cannot write"),
        (["{config}", "--prompt", "a", "--device", "abacus"], "abacus"),
        (["{config}", "--what"], "--what"),
    ],
)
def test_bad_input_is_one_line_before_the_model_is_built(
    run, config, arguments, said, monkeypatch, tmp_path
):
    from mmagic_tome.visualization import command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "build_model", lambda *_: pytest.fail("built"))
    code, out, err = run(*(argument.format(config=config) for argument in arguments))
    assert code == 2 and said in err and err.count("\n") == 1 and not out


def test_step_caching_beside_merging_and_alone(run, sd_folder, tmp_path):
    model = tiny_config(folder=sd_folder)
    both = dict(tome_cfg=dict(ratio=0.5), cache_cfg="fast")
    quick = ["--prompt", "cat", "--size", "64", "--steps", "6", "--device", "cpu"]
    path = write_config(tmp_path / "both.py", model, **both)
    code, _, err = run(path, "--out", tmp_path / "maps", *quick)
    assert code == 0, err
    found = json.loads((tmp_path / "maps" / "result.json").read_text())
    assert [cache["region"] for cache in found["step_caching"]] == ["network", "inner"]
    with Image.open(tmp_path / "maps" / "0000_cat_merge.gif") as gif:
        assert gif.n_frames < 6, "nothing is merged at a step that is skipped"
    path = write_config(tmp_path / "alone.py", model, cache_cfg="fast")
    code, _, err = run(path, "--out", tmp_path / "none", *quick)
    assert code == 2 and "step caching alone has no merge maps" in err


def test_no_such_block(run, config, tmp_path):
    code, _, err = run(config, "--prompt", "a", "--block", "cellar", "--out", tmp_path / "x")
    assert code == 2 and "no merged block has cellar in its name" in err
