# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Memory to the byte, clocks that wait for the device, energy as NVML counts it."""

import sys
from types import SimpleNamespace

import torch

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


def test_clock():
    seconds, out = Clock("cpu")(lambda: 7)
    assert out == 7 and 0 <= seconds < 1


def test_energy_is_that_of_the_device_by_its_uuid_in_joules(monkeypatch):
    """NVML as it answers, in millijoules, to who asks for this GPU and no other."""
    millijoules = iter([0, 5_000, 7_500])
    asked = []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules),
    )
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
