# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Another kind of network in the benchmark: what it takes is a shape and a way to merge."""

import json
from dataclasses import dataclass

import pytest
from torch import nn

from mmagic_tome import ToMeError
from mmagic_tome.benchmark import cli, targets
from mmagic_tome.benchmark.kinds import Merging, Shape


class Options(dict):
    to_dict = dict.copy


class Layers(nn.Module):
    """Two layers on tokens; `kept` tokens get through the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.kept = nn.Linear(8, 8), nn.Linear(8, 8), None

    def forward(self, x):
        return self.second(self.first(x)[:, : self.kept]).mean(1)


class HalfMerging(Merging):
    def options(self, args):
        return {"kept": args.r or 2}

    def config(self, options):
        if set(options) != {"kept"}:
            raise ToMeError("it takes kept")
        return Options(options)

    def ours(self, network, config, run):
        network.kept = config["kept"]
        run(network)
        return [{"block": "second", "kind": "all", "tokens": 16, "kept": network.kept}]

    def ideal(self, network, sites, run):
        network.kept = sites[0]["kept"]
        run(network)


@dataclass(frozen=True)
class LayersShape(Shape):
    merging = HalfMerging()
    unit = 4

    def network(self):
        return Layers()

    def call(self, network, size, batch, noise):
        x = noise(batch, size[0] // 4 * (size[1] // 4), 8)
        return lambda network: network(x)

    def activations(self, size, batch, written_out):
        return batch * size[0] * size[1]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    shapes = {"layers": LayersShape("layers", size=16, batch=3, counts="pictures")}
    monkeypatch.setattr(targets, "SHAPES", shapes)

    def call(*argv):
        path = tmp_path / "figures.json"
        argv = ["--target", "layers", "--rounds", "3", "--device", "cpu", "--json", path, *argv]
        argv.append("--no-memory")
        code = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out + err, json.loads(path.read_text()) if code == 0 else None

    return call


def test_contenders_and_what_they_do_per_second(run):
    code, said, figures = run("--tome", "more={'kept': 8}")
    assert code == 0, said
    (case,) = figures["cases"]
    assert case["case"]["batch"] == 3 and case["case"]["size"] == [16, 16]
    assert list(case["results"]) == ["dense", "ours", "more", "ideal", "ideal for more"]
    assert case["results"]["more"]["ideal"] == "ideal for more" and "kept 2" in said
    assert "| s / forward (min - max) | pictures / s | x dense" in said
    for row in case["summary"]:
        assert row["pictures_per_second"] == pytest.approx(3 / row["seconds"])
    head, line = (text for text in said.splitlines() if text.startswith(("|---", "| dense")))
    assert head.count("|") == line.count("|") == 8


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--contenders", "ours", "tomesd"], "there is no tomesd for layers, only dense, ours"),
        (["--tome", "more={'r': 8}"], "--tome more: it takes kept"),
        (["--size", "18"], "multiples of 4; the nearest is 16x16"),
    ],
)
def test_what_a_kind_does_not_know_is_said(run, options, complaint):
    code, said, _ = run(*options)
    assert code == 2 and complaint in said
