# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What benchmarks/vit_quality.py calls agreement and a neighbour."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def quality():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        path = ROOT / "benchmarks/vit_quality.py"
        spec = importlib.util.spec_from_file_location("vit_quality", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def test_neighbours_vote_without_the_image_itself(quality):
    # Two bundles of six; the last of the first bundle has the label of the second.
    near, far = torch.eye(2).repeat_interleave(6, 0).split(6)
    noise = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    labels = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert quality.neighbours(torch.cat([near, far]) + 0.01 * noise, labels) == [0] * 6 + [1] * 6


def test_agreement_is_one_for_the_same_and_falls(quality):
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    same = quality.compare((maps, tokens), (maps, tokens), [])
    assert same == pytest.approx({"correlation": 1, "worst": 1, "iou": 1})
    half = maps.clone()
    half[:, :4] = 1 - half[:, :4]
    other = quality.compare((maps, tokens), (half, tokens), [])
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(maps, half)]
    expected = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
    assert other["correlation"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert other["worst"] == pytest.approx(expected.min().item(), abs=1e-5)
    a, b = maps > 0.5, half > 0.5
    iou = [(p & q).sum().item() / (p | q).sum().item() for p, q in zip(a, b)]
    assert other["iou"] == pytest.approx(sum(iou) / 3)


def test_every_ablation_is_asked_about_once(quality):
    asked = [tuple(options) for options in quality.options_of(224)]
    assert len(asked) == 4 + 4 + 1 + 12 and len(quality.options_of(518)) == 8
