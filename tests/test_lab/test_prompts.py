# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Prompts: what files say, which half a caption is in, and the seed of every image."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab.prompts import Prompt, read_prompts, request_for, spread

CAPTIONS = Path(__file__).parents[2] / "examples" / "demo_model"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_json_csv_and_lists_say_the_same(tmp_path):
    entries = ["a cat", {"prompt": "a dog, brown", "negative_prompt": "rain", "seed": 7}]
    expected = [Prompt("a cat"), Prompt("a dog, brown", "rain", 7)]
    rows = '\ufeffprompt,size,negative_prompt,seed\na cat,4,,\n"a dog, brown",,rain,7\n'
    assert read_prompts(entries) == expected
    assert read_prompts(write(tmp_path / "p.json", json.dumps(entries))) == expected
    assert read_prompts(write(tmp_path / "p.csv", rows)) == expected
    lines = write(tmp_path / "p.TXT", "\n# animals\na cat\n\n  a dog, brown \n")
    assert read_prompts(str(lines)) == [Prompt("a cat"), Prompt("a dog, brown")]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.txt", "# nothing\n\n", r"p\.txt holds no prompts"),
        ("p.json", "[\n{", r"cannot read prompts from .*p\.json: .* line 2"),
        ("p.json", '{"prompt": "a"}', "write a list of prompts, not of type dict"),
        ("p.json", '["a", " "]', "entry 2: no prompt"),
        ("p.json", '[{"prompt": "a", "sed": 1}]', "entry 1: write a text or a dict"),
        ("p.json", '[{"prompt": "a", "seed": -1}]', "entry 1: seed must be in"),
        ("p.json", '[{"prompt": "a", "negative_prompt": 1}]', "negative_prompt must be a text"),
        ("p.csv", "text\na\n", "no column 'prompt'"),
        ("p.csv", 'prompt,seed\n"two\nlines",1\na,many\n', r"p\.csv, entry 2: seed must be"),
        ("p.yaml", "- a", r"no \.txt, \.json or \.csv file and no built-in set"),
    ],
)
def test_an_error_names_the_file_and_the_entry(tmp_path, name, text, complaint):
    with pytest.raises(ToMeError, match=complaint):
        read_prompts(write(tmp_path / name, text))


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ToMeError, match=r"cannot read prompts from .*nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ToMeError, match="cannot read prompts"):
        read_prompts(tmp_path / "binary.txt")


def test_the_built_in_sets_are_what_the_demo_model_was_trained_on_and_what_not():
    captions = {}
    for name in ("concepts", "concepts_mixed", "held_out"):
        captions[name] = {one.text for one in read_prompts(CAPTIONS / f"{name}.txt")}
    demo, held_out = read_prompts("demo"), read_prompts("demo-held-out")
    assert {one.text for one in demo} == captions["concepts"]
    assert {one.text for one in held_out} < captions["held_out"]
    assert len(held_out) == len({one.text for one in held_out}) == 561
    assert not {one.text for one in held_out} & (captions["concepts"] | captions["concepts_mixed"])


def test_a_limit_is_spread_over_the_list():
    prompts = [Prompt(str(i)) for i in range(10)]
    assert [one.text for one in spread(prompts, 4)] == ["0", "2", "5", "7"]
    assert spread(prompts, 99) == prompts


def test_every_image_has_a_seed_of_its_own():
    source = SimpleNamespace(defaults={"negative_prompt": "blur"})
    bare = SimpleNamespace(defaults={})
    prompts = [Prompt("a"), Prompt("b", "rain", 9), Prompt("c")]
    request = request_for(bare, prompts, {"seed": 2**32 - 2})
    assert request.prompts == ("a", "b", "c")
    assert [request.seed_of(i) for i in range(3)] == [2**32 - 2, 9, 0]
    assert request.negatives([0, 1]) == ["", "rain"]
    assert request_for(SimpleNamespace(defaults={"prompts": ["d"]}), [], {}).prompts == ("d",)
    assert request_for(bare, prompts[:1], {}).negative_prompt is None
    assert request_for(source, prompts[:2], {"seed": None}).negatives([0, 1]) == ["blur", "rain"]
    for given, said in [
        ({"seed": -1}, "seed=-1 must be an integer in"),
        ({"seed": [1, 2]}, "seed is one for all"),
    ]:
        with pytest.raises(ToMeError, match=said):
            request_for(bare, prompts, given)
