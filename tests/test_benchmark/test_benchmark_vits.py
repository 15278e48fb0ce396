# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers as targets of the benchmark."""

import json

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

from mmagic_tome import ToMeError
from mmagic_tome.benchmark import cli, targets
from mmagic_tome.benchmark.targets import build_shape, on_meta
from mmagic_tome.benchmark.vits import VIT_MERGING, VITS, ViTShape

TINY = dict(size=48, batch=2, width=32, depth=3, heads=2, patch=8)


@pytest.fixture
def tiny(monkeypatch):
    shapes = {
        "vit-tiny": ViTShape("tiny", counts="images", **TINY),
        "clip-tiny": ViTShape("tiny", counts="clips", clips=True, **{**TINY, "size": 16}),
    }
    monkeypatch.setattr(targets, "SHAPES", shapes)
    return shapes


def test_shapes_are_those_of_the_papers():
    millions = {
        name: sum(p.numel() for p in on_meta(shape).parameters()) / 1e6
        for name, shape in VITS.items()
        if name in ("vit-s16", "vit-b16", "vit-l16", "videomae-b")
    }
    # Counts of the published models with a thousand classes (400 for the clips).
    assert millions["vit-s16"] == pytest.approx(22.05, abs=0.01)
    assert millions["vit-b16"] == pytest.approx(86.57, abs=0.01)
    assert millions["vit-l16"] == pytest.approx(304.33, abs=0.01)
    assert millions["videomae-b"] == pytest.approx(86.5, abs=0.3)


@pytest.mark.parametrize("name", ["vit-tiny", "clip-tiny"])
def test_ours_and_the_ideal_run_on_the_same_numbers_of_tokens(tiny, name):
    from mmagic_tome.vit.families import find_vit

    target = build_shape(name, "cpu", torch.float32)
    call = target.call(target.size, 2)
    run = torch.inference_mode()(call)
    dense = run(target.network)
    assert torch.isfinite(dense).all()

    def rows(network):
        seen = []
        hooks = [
            hook
            for block in find_vit(network).blocks
            for hook in (
                block.attention.register_forward_hook(
                    lambda m, a, y: seen.append((a[0] if a else y[0]).shape[1])
                ),
                block.norm.register_forward_hook(lambda m, a, y: seen.append(y.shape[1])),
            )
        ]
        out = run(network)
        for hook in hooks:
            hook.remove()
        return seen, out

    from mmagic_tome.benchmark.contenders import share_weights

    ours, ideal = share_weights(target.network), share_weights(target.network)
    sites = VIT_MERGING.ours(ours, VIT_MERGING.config({"r": 2}), run)
    VIT_MERGING.ideal(ideal, sites, run)
    tokens = sites[0]["tokens"]
    expected = [tokens, tokens - 2, tokens - 2, tokens - 4, tokens - 4, tokens - 6]
    for network in (ours, ideal):
        seen, out = rows(network)
        assert seen == expected
        assert out.shape == dense.shape and not torch.equal(out, dense)
    assert torch.equal(run(target.network), dense)


def test_the_command_counts_images(tiny, tmp_path, capsys):
    path = tmp_path / "result.json"
    code = cli.main(
        [
            *("--target", "vit-tiny", "--r", "4", "--rounds", "3", "--no-memory"),
            *("--json", str(path), "--tome", "plain={'prop_attn': False}"),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    assert "images / s" in out and "| plain |" in out
    (case,) = json.loads(path.read_text())["cases"]
    assert {"dense", "ours", "ideal", "plain"} <= set(case["results"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ratio", "0.5"], "--ratio is for denoisers; for vit-s16 write --r"),
        (["--r", "0"], "--r 0 merges nothing"),
        (["--tome", "x={'ratio': 0.5}"], "has no option 'ratio'"),
        (["--tome", "x={'metric': 'colour'}"], "must be one of keys"),
        (["--size", "225"], "the nearest is 224x224"),
    ],
)
def test_wrong_requests(words, message):
    with pytest.raises(ToMeError, match=message):
        cli.parse_args(["--target", "vit-s16", *words])
