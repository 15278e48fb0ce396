# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Prompts from files and built-in sets, and the seed of every picture."""

import json

import pytest

from mmagic_tome import ToMeError
from mmagic_tome.evaluation.prompts import Prompt, load_prompts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_json_and_csv_say_the_same(tmp_path):
    texts = [("a cat", None, None), ("a dog, brown", "rain", 7)]
    as_json = ["a cat", {"prompt": "a dog, brown", "negative_prompt": "rain", "seed": 7}]
    rows = 'prompt,negative_prompt,seed\na cat,,\n"a dog, brown",rain,7\n'
    files = [
        write(tmp_path / "p.json", json.dumps(as_json)),
        write(tmp_path / "p.csv", rows),
    ]
    expected = [Prompt(t, n, i if s is None else s) for i, (t, n, s) in enumerate(texts)]
    for path in files:
        assert load_prompts(path).prompts == expected
    lines = write(tmp_path / "p.txt", "\n# animals\na cat\n\n a dog, brown \n")
    assert load_prompts(lines, seed=3).prompts == [
        Prompt("a cat", None, 3),
        Prompt("a dog, brown", None, 4),
    ]


def test_duplicates_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "p.txt", "cat\ndog\ncat\ncat\n")
    prompts = load_prompts(path)
    assert [p.text for p in prompts.prompts] == ["cat", "dog"]
    (note,) = prompts.notes
    assert "2 of 4" in note and "'cat'" in note
    # With seeds of their own they are different pictures.
    path = write(tmp_path / "p.csv", "prompt,seed\ncat,1\ncat,2\n")
    assert [p.seed for p in load_prompts(path).prompts] == [1, 2]
    assert not load_prompts(path).notes


def test_seeds_are_distinct_and_belong_to_the_place(tmp_path):
    path = write(tmp_path / "p.txt", "a\nb\nc\n")
    prompts = load_prompts(path, images_per_prompt=2, seed=2**32 - 3).prompts
    assert [p.text for p in prompts] == ["a", "a", "b", "b", "c", "c"]
    assert [p.seed for p in prompts] == [2**32 - 3, 2**32 - 2, 2**32 - 1, 0, 1, 2]
    (first, second) = load_prompts([{"prompt": "a", "seed": 9}], images_per_prompt=2).prompts
    assert (first.seed, second.seed) == (9, 10)


def test_built_in_sets():
    imagenet = load_prompts("imagenet", template="a {}.", images_per_prompt=2).prompts
    assert len(imagenet) == 2000
    assert imagenet[0].text == imagenet[1].text == "a tench."
    demo = load_prompts("demo")
    assert len({p.text for p in demo.prompts}) == len(demo.prompts) > 100
    some = load_prompts("imagenet", limit=4)
    assert len(some.prompts) == 4 and "4 of 1000" in some.notes[0]
    assert some.digest() != load_prompts("imagenet", limit=4, seed=1).digest()


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.txt", "", "is empty"),
        ("p.txt", "# nothing\n\n", "holds no prompts"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", "{", "is not JSON"),
        ("p.json", '{"prompt": "a"}', "expected a list, got dict"),
        ("p.json", '["a", " "]', "entry 2 has no prompt"),
        ("p.json", '["a", 5]', "entry 2 is 5"),
        ("p.json", '[{"prompt": "a", "sed": 1}]', "unknown keys"),
        ("p.json", '[{"prompt": "a", "seed": -1}]', "seed must be in"),
        ("p.csv", "text\na\n", "no column 'prompt'"),
        ("p.csv", "prompt,seed\na,many\n", "entry 1: seed"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.yaml", "- a", "expected a .txt, .json or .csv"),
    ],
)
def test_bad_files(tmp_path, name, text, complaint):
    with pytest.raises(ToMeError, match=complaint):
        load_prompts(write(tmp_path / name, text))


def test_what_is_no_file(tmp_path):
    with pytest.raises(ToMeError, match="cannot read"):
        load_prompts(tmp_path / "nowhere.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ToMeError, match="not UTF-8"):
        load_prompts(tmp_path / "binary.txt")
    with pytest.raises(ToMeError, match=r"has no \{\}"):
        load_prompts(["a"], template="a picture")
