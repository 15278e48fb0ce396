# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The benchmark for a GPU, at small shapes on a CPU."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_unet_config

from benchmarks import figures, gpu
from mmagic_tome.lab import benchmark
from mmagic_tome.lab.networks import NETWORKS, Network


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Small shapes, and a network that is smaller still."""
    tiny = Network(tiny_unet_config(), factor=4, size=64, text=7)
    monkeypatch.setitem(NETWORKS, "small", tiny)
    compiled = partial(torch.compile, backend="eager")
    monkeypatch.setattr(benchmark, "_compiled", compiled)
    torch.compiler.reset()  # graphs of other tests count towards the limit of recompilations
    return gpu.Bench("cpu", tmp_path / "work", small=True)


def lines(bench):
    return sorted(
        line for path in bench.work_dir.rglob("rows*.jsonl") for line in path.open(encoding="utf-8")
    )


FIGURES = {
    "attention": ("gpu_attention", "gpu-attention", ["mask", "channels", "small, batch 2"]),
    "eager": ("gpu_networks", "gpu-networks", ["ToMe 0.5, unweighed", "peak memory", "eager"]),
    "compiled": ("gpu_networks", "gpu-networks", ["ToMe 0.5, blocks", "compiled"]),
    "caching": ("gpu_caching", "gpu-caching", ["interval 2", "tolerance", "skipped step"]),
    "frontier": ("gpu_frontier", "gpu-frontier", ["balanced", "2 steps", "PSNR"]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:step caching skipped nothing")
@pytest.mark.parametrize("part", FIGURES)
def test_a_part_is_measured_once_and_its_figure_drawn(part, bench, tmp_path):
    data, figure, words = FIGURES[part]
    page = tmp_path / "docs" / "page.md"
    (tmp_path / "benchmarks/data").mkdir(parents=True)
    page.parent.mkdir()
    assert figures.FIGURES[figure](page) == "*Not measured yet.*"
    gpu.PARTS[part](bench)
    found = lines(bench)
    assert found
    gpu.PARTS[part](bench)
    assert lines(bench) == found
    (path,) = gpu.collect(bench, tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["rows"] and record["settings"]
    path.rename(tmp_path / f"benchmarks/data/{data}.json")
    table = figures.FIGURES[figure](page)
    assert all(word in table for word in words)


def test_what_was_interrupted_goes_on(bench):
    gpu.attention(bench)
    found = lines(bench)
    (path,) = bench.work_dir.rglob("rows.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + '{"kind": "att')
    kept = [line for line in lines(bench) if line.endswith("\n")]
    assert {row["case"] for row in gpu._rounds(bench, "attention", lambda row: {"s": 0})} == set()
    gpu.attention(bench)
    assert len(lines(bench)) >= len(found) and set(kept) <= set(lines(bench))
    rows = gpu._rounds(bench, "attention", lambda row: {"s": row["seconds"]})
    assert len(rows) == 6 and all(len(row["s"]) == 2 for row in rows)


def test_a_part_ends_at_its_time_limit(tmp_path, capfd):
    options = ["--device", "cpu", "--small", "--work-dir", tmp_path, "--out", tmp_path / "out"]
    gpu.main(list(map(str, [*options, "--parts", "caching", "--seconds-per-part", 0.2])))
    assert "caching: out of time; the same command goes on with it" in capfd.readouterr().out
    assert not list((tmp_path / "out").iterdir())


def test_cases_are_networks_that_exist():
    cases = gpu.Bench("cpu", Path(), small=False).cases()
    assert {name for name, _, _ in cases} <= set(NETWORKS)
    for name, pixels, _ in cases:
        assert pixels % NETWORKS[name].unit == 0
    assert sum(gpu.LIMITS.values()) <= 480 and set(gpu.LIMITS) == set(gpu.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no GPU here; write --device cpu"):
        gpu.main([])
