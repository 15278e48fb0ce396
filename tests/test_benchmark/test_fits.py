# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Memory that is not there is said before a network is built."""

import os
import sys

import pytest
import torch

from mmagic_tome import ToMeError
from mmagic_tome.benchmark import fits
from mmagic_tome.benchmark.targets import SHAPES, build_shape, on_meta


def test_weights_are_counted_without_being_there():
    network = build_shape("small", "cpu", torch.float32).network
    held = sum(t.numel() for t in (*network.parameters(), *network.buffers())) * 4
    weights, forward = fits.needed_memory(SHAPES["small"], (256, 256), 2, torch.float32)
    assert weights == held and forward > 0
    assert fits.needed_memory(SHAPES["small"], (256, 256), 2, torch.float32, True)[1] > forward


@pytest.mark.parametrize(
    ("name", "billions"),
    # The sizes of the published models.
    [("sd15", 0.860), ("sd21", 0.866), ("sdxl", 2.567), ("sd3", 2.028), ("flux", 11.901)],
)
def test_shapes_are_those_of_the_published_models(name, billions):
    count = sum(p.numel() for p in on_meta(SHAPES[name]).parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.0006)


def test_too_little_memory_is_said_before_building(monkeypatch):
    monkeypatch.setattr(fits, "available_memory", lambda device: 30 * 2**20)
    arguments = ("small", SHAPES["small"], (64, 64), 2)
    with pytest.raises(ToMeError, match=r"needs about .* has 0\.0 GiB free; write --dtype bf16"):
        fits.check_fits(*arguments, torch.float32, "cpu")
    fits.check_fits(*arguments, torch.bfloat16, "cpu")


def test_available_memory_is_the_least_that_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(fits, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert fits.available_memory("cpu") == 2**63
    meminfo, group = tmp_path / "proc" / "meminfo", tmp_path / "sys" / "fs" / "cgroup"
    meminfo.parent.mkdir()
    group.mkdir(parents=True)
    meminfo.write_text("MemTotal:       900 kB\nMemAvailable:   300 kB\n")
    assert fits.available_memory("cpu") == 300 * 1024
    (group / "memory.current").write_text("5000\n")
    for limit, left in (("max\n", 300 * 1024), ("9000\n", 4000), ("999999999\n", 300 * 1024)):
        (group / "memory.max").write_text(limit)
        assert fits.available_memory("cpu") == left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told by Linux")
def test_available_memory_of_this_machine():
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < fits.available_memory("cpu") < whole
