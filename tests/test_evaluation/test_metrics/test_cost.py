# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import json
import sys
import time

import pytest
import tiny
import torch

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.evaluation.metrics.cost import CostMeter, count_flops, spread, tokens_removed


def test_spread_lies_between_neighbours():
    # Of 1, 2.5, 3, 4, 5, 9 the places 0.5, 2.5 and 4.5.
    found = spread([5.0, 1.0, 4.0, 2.5, 9.0, 3.0])
    assert found == {"median": 3.5, "p10": pytest.approx(1.75), "p90": pytest.approx(7.0)}
    assert spread([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    with pytest.raises(ToMeError, match="no figures"):
        spread([])


def test_meter_leaves_the_warm_up_out_and_divides_by_pictures():
    meter = CostMeter(warm_up=1)
    for seconds in (0.2, 0.02, 0.02):
        with meter.run(images=2):
            time.sleep(seconds)
    report = meter.report()
    assert (report["runs"], report["images"]) == (2, 4)
    assert 0.01 <= report["seconds_per_image"]["median"] < 0.1
    assert report["images_per_second"] == pytest.approx(4 / sum(run.seconds for run in meter.runs))
    assert report["peak_cuda_memory"] is None
    assert report["joules_per_image"] is None
    json.dumps(report, allow_nan=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak of a run: Linux only")
def test_peak_of_process_memory_is_of_the_run():
    meter = CostMeter(warm_up=0)
    for size in (200, 1):
        with meter.run():
            bytearray(b"1") * (size << 20)
    large, small = (run.process_memory for run in meter.runs)
    if large is None:
        pytest.skip("no right to reset the peak here")
    assert large - small > 100 << 20


def test_a_run_that_fails_does_not_count_and_none_is_an_error():
    meter = CostMeter(warm_up=0)
    with pytest.raises(RuntimeError), meter.run():
        raise RuntimeError
    with pytest.raises(ToMeError, match="none is left"):
        meter.report()
    with pytest.raises(ToMeError, match="images=0"), meter.run(images=0):
        pass
    with pytest.raises(ToMeError, match="warm_up=-1"):
        CostMeter(warm_up=-1)


def test_flops_of_attention_linear_and_convolution():
    q = torch.randn(2, 4, 64, 16)
    v = torch.randn(2, 4, 32, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    # q @ k and the weights @ v: 2 x 64 x 32 x 16 each, for 2 x 4 heads.
    assert count_flops(attention, q, v, v) == 2 * 4 * 2 * (2 * 64 * 32 * 16)
    assert count_flops(torch.nn.Linear(8, 16), torch.randn(4, 8)) == 2 * 4 * 8 * 16
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert count_flops(layer, torch.randn(1, 3, 8, 8)) == 2 * 8 * 8 * 9 * 3 * 5


def test_flops_of_a_product_in_8_bits():
    left, right = (torch.ones(shape, dtype=torch.int8) for shape in ((32, 16), (16, 24)))
    assert count_flops(torch._int_mm, left, right) == 2 * 32 * 16 * 24


@pytest.mark.parametrize("exact", [False, True])
def test_merging_saves_flops_and_tokens(exact):
    """As many where the search is in 8 bits, on CPUs that are fast at it, as where it is not."""
    unet, inputs = tiny.tiny_unet(), tiny.tiny_inputs()
    dense = count_flops(unet, **inputs)
    handle = apply_tome(unet, ratio=0.5, exact_matching=exact)
    assert tokens_removed(handle.stats()) == {"tokens": 0, "removed": 0, "share": 0.0}
    merged = count_flops(unet, **inputs)
    # Of each of 2 pictures and 3 self-attentions, which have 256 tokens of width 16.
    saved = 4 * 2 * 128 * 16 * 16  # q, k, v and what follows, of the other half of the tokens
    saved += 2 * 2 * (256**2 - 128**2) * 16  # scores, and the weighted mean
    search = 2 * 192 * 64 * 16
    assert dense - merged == 2 * 3 * (saved - search)
    removed = tokens_removed(handle.stats())
    sites = len(handle.stats())
    assert removed == {"tokens": 256 * sites, "removed": 128 * sites, "share": 0.5}
