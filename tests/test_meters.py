# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Memory to the byte, clocks that wait for the device, energy as NVML counts it."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from mmagic_tome import meters
from mmagic_tome.meters import Clock, energy_reader, peak_memory

MIB = 2**18  # float32 values


def test_peak_of_tensors_is_exact_and_the_same_every_time():
    def work():
        a = torch.zeros(MIB)
        b = torch.cat([a, a])  # 1 + 2
        del a
        c = b.clone()  # 2 + 2: the peak
        del b
        return c

    assert {peak_memory(work, "cpu") for _ in range(3)} == {(4 * 2**20, "aten::clone")}


def test_what_was_there_before_does_not_count():
    held = torch.zeros(8 * MIB)
    assert peak_memory(lambda: held[:MIB].clone(), "cpu")[0] == 2**20


def test_clock_of_the_wall_and_of_the_processor():
    def sleep():
        time.sleep(0.1)
        return 7

    seconds, out = Clock("cpu")(sleep)
    assert out == 7 and seconds >= 0.1
    assert Clock("cpu", "cpu")(sleep)[0] < 0.1


def test_clock_waits_for_the_device_at_both_ends(monkeypatch):
    done = []
    monkeypatch.setattr(meters, "finish", lambda device: done.append("finish"))
    clock = Clock("cpu")
    clock.now = lambda: done.append("now") or float(len(done))
    assert clock(lambda: done.append("work")) == (3.0, None)
    assert done == ["finish", "now", "work", "finish", "now"]


def test_energy_is_that_of_the_device_by_its_uuid_in_joules(monkeypatch):
    """NVML as it answers, in millijoules, to who asks for this GPU and no other."""
    millijoules = iter([0, 5_000, 7_500])
    asked = []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules),
    )
    real = pytest.importorskip("pynvml", reason="its names are checked")
    assert all(callable(getattr(real, name)) for name in vars(nvml))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = SimpleNamespace(uuid="1-2-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    read = energy_reader(torch.device("cuda"))
    assert asked == ["GPU-1-2-3"]
    assert read() == 5.0 and read() == 7.5


def test_no_energy_where_nobody_counts_it(monkeypatch):
    assert energy_reader(torch.device("cpu"))() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert energy_reader(torch.device("cuda"))() is None
