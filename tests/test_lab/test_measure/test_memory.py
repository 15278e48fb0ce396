# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Memory to the byte."""

import pytest
import torch
from denoise import STEPS, denoise
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_cache
from mmagic_tome.lab.measure import peak_memory

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


def test_tensors_that_existed_before_do_not_count():
    held = torch.zeros(8 * MIB)
    assert peak_memory(lambda: held[:MIB].clone(), "cpu")[0] == 2**20


def test_a_call_that_frees_what_an_earlier_call_kept_needs_as_much_as_the_first():
    kept = []

    def work():
        kept.clear()
        kept.append(torch.zeros(2 * MIB))
        return torch.zeros(MIB)

    assert [peak_memory(work, "cpu")[0] for _ in range(3)] == [3 * 2**20] * 3


@pytest.mark.parametrize("preset", ["quality", "balanced"])
def test_state_that_step_caching_keeps_counts_however_often_the_model_ran(preset):
    unet, inputs = tiny_unet(levels=3), tiny_inputs()
    with torch.no_grad():
        baseline = peak_memory(lambda: unet(**inputs), "cpu")[0]
        with apply_cache(unet, preset) as handle:
            found = []
            for _ in range(3):
                handle.reset_run()
                found.append(peak_memory(lambda: unet(**inputs), "cpu")[0])
                denoise(unet, inputs, STEPS[:2])  # keeps state
        assert len(set(found)) == 1 and found[0] > baseline
