# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Scripts beside the benchmark tool, on a small network."""

import importlib.util
import re
from pathlib import Path

import pytest

from mmagic_tome.patch import Hook
from mmagic_tome.tome.network import StepHook
from mmagic_tome.tome.target import TargetPostHook, TargetPreHook

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--shape", "small", "--size", "128", "--batch", "1"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory(capsys):
    options = ['kept={"plan_interval": 2}', 'blocks={"targets": "block", "max_downsample": 4}']
    load("memory").main([*SMALL, *(part for text in options for part in ("--tome", text))])
    lines = [line for line in capsys.readouterr().out.splitlines() if "MiB" in line]
    names = [line.split()[0].rstrip(":") for line in lines]
    peaks = [float(re.search(r"([0-9.]+) MiB", line)[1]) for line in lines]
    assert names == ["dense", "kept", "blocks"]
    dense, kept, blocks = peaks
    assert blocks < dense < kept < 1.1 * dense


def test_time_inside_hooks_counts_once_and_leaves_no_trace(capsys):
    kinds = (StepHook, TargetPreHook, TargetPostHook)
    calls = {kind: vars(kind)["__call__"] for kind in kinds}
    assert all(issubclass(kind, Hook) for kind in kinds)
    load("in_hooks").main([*SMALL, "--runs", "1", "--plan-interval", "2"])
    said = capsys.readouterr().out
    inside = float(re.search(r"in hooks ([0-9.]+) s", said)[1])
    parts = dict(re.findall(r"    ([A-Za-z]+): ([0-9.]+) ms", said))
    # What a hook calls is in its own time.
    assert {"BlockPreHook", "TargetPreHook", "TargetPostHook"} <= set(parts)
    assert sum(map(float, parts.values())) / 1000 == pytest.approx(inside, abs=2e-3)
    assert all(vars(kind)["__call__"] is call for kind, call in calls.items())
