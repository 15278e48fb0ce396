# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the scripts in benchmarks/ call an error, agreement and a neighbour."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")


def script(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_word_errors_are_the_fewest_edits():
    speech = script("vit_speech")
    truth = speech.words("The ferry leaves, at seven!")
    assert truth == ["the", "ferry", "leaves", "at", "seven"]
    for said, errors in (
        ("the ferry leaves at seven", 0),
        ("The fairy leaves at seven.", 1),  # another word
        ("the ferry at seven", 1),  # one less
        ("well the ferry leaves at seven", 1),  # one more
        ("ferry the leaves at seven", 2),
        ("", 5),
        ("a b c d e f g", 7),
    ):
        assert speech.word_errors(truth, speech.words(said)) == errors
    assert speech.word_errors([], ["a"]) == 1
    assert len(speech.SENTENCES) == 40 and {"r": 0} in speech.contenders()


def test_neighbours_vote_without_the_picture_itself():
    quality = script("vit_quality")
    # Two bundles of six; the last of the first bundle has the label of the second.
    near, far = torch.eye(2).repeat_interleave(6, 0).split(6)
    features = torch.cat([near, far]) + 0.01 * torch.randn(
        12, 2, generator=torch.Generator().manual_seed(0)
    )
    labels = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert quality.neighbours(features, labels) == [0] * 6 + [1] * 6


def test_agreement_is_one_for_the_same_and_falls():
    quality = script("vit_quality")
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    same = quality.compare((maps, tokens), (maps, tokens), [])
    for key in ("correlation", "correlation_worst", "iou", "class_token"):
        assert same[key] == pytest.approx(1)
    half = maps.clone()
    half[:, :4] = 1 - half[:, :4]
    other = quality.compare((maps, tokens), (half, tokens), [])
    expected = torch.stack(
        [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(maps, half)]
    )
    assert other["correlation"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert other["correlation_worst"] == pytest.approx(expected.min().item(), abs=1e-5)
    a, b = maps > 0.5, half > 0.5
    iou = [(p & q).sum().item() / (p | q).sum().item() for p, q in zip(a, b)]
    assert other["iou"] == pytest.approx(sum(iou) / 3)
    # Every option of the ablations is asked about once.
    asked = [set(options) - {"r"} for options in quality.contenders(224)]
    assert {"metric", "distance", "combination", "partition", "prop_attn"} == set().union(*asked)


def test_training_takes_turns_goes_on_and_fine_tunes(tmp_path, monkeypatch, capsys):
    training = script("vit_training")
    for name, value in dict(SIZE=16, WIDTH=12, DEPTH=2, HEADS=2, BATCH=8).items():
        monkeypatch.setattr(training, name, value)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "pictures.npz", pictures=pictures, labels=np.array(["a", "b"] * 20))

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of all tests behind it
    options = {"r": 1, "epochs": 2, "seeds": 1, "tune-r": 2, "tune-epochs": 1, "work": tmp_path}
    words = ["vit_training.py", *(f"--{name}={value}" for name, value in options.items())]
    monkeypatch.setattr("sys.argv", words)

    def run():
        training.main()
        return json.loads((tmp_path / "result.json").read_text())["runs"]

    (whole,) = run()
    assert whole["pictures"] == {"train": 32, "held out": 8}
    assert len(whole["trained"]["merged"]["loss_per_epoch"]) == 2
    assert (
        whole["trained"]["dense"]["loss_per_epoch"] != whole["trained"]["merged"]["loss_per_epoch"]
    )
    assert set(whole["tuned"]) == {"not", "dense", "merged"}
    assert whole["tuned"]["not"]["accuracy_r0"] == whole["trained"]["dense"]["accuracy_r0"]
    assert "| fine-tuned | run dense | run with r=2 |" in capsys.readouterr().out
    # What was saved is not trained again.
    monkeypatch.setattr(training.Contender, "epoch", None)
    assert run() == [whole]
