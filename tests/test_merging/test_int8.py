# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import bipartite_match, random_layout
from mmagic_tome.merging import int8 as int8_module
from mmagic_tome.merging.int8 import nearest_int8

pytestmark = pytest.mark.skipif(
    not hasattr(torch, "_int_mm"), reason="this torch has no 8-bit product"
)


def tokens(batch, count, channels, seed=0, dtype=torch.float32):
    """Smooth along the sequence, as tokens of a picture are, with channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, count, channels, generator=generator).cumsum(1) / count**0.5
    x = x + 0.3 * torch.randn(batch, count, channels, generator=generator)
    return (x * torch.rand(channels, generator=generator).mul(4).exp()).to(dtype)


def scores(source, destination):
    source, destination = (F.normalize(x.double(), dim=-1) for x in (source, destination))
    return source @ destination.mT


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(2, 70),
    st.integers(1, 500),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_what_is_chosen_is_nearly_the_best(batch, num_src, num_dst, channels, bound, dtype):
    x = tokens(batch, num_src + num_dst, channels, seed=num_src, dtype=dtype)
    source, destination = x[:, :num_src], x[:, num_src:]
    picks = torch.arange(num_src)
    similarity, nearest = nearest_int8(x, picks, F.normalize(destination, dim=-1), bound)
    assert similarity.shape == nearest.shape and similarity.dtype == dtype
    assert nearest.shape == (batch, num_src) and nearest.dtype == torch.int64
    every = scores(source, destination)
    best = every.amax(-1)
    chosen = every.gather(-1, nearest[..., None])[..., 0]
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(similarity.double(), chosen, rtol=tolerance, atol=tolerance)
    # Two roundings of at most half a level of the largest entry, over all channels.
    assert (best - chosen).max() < 2 * channels**0.5 / 127


def test_most_choices_are_those_of_full_precision():
    x = tokens(2, 4096, 320)
    source, destination = x[:, 1024:], F.normalize(x[:, :1024], dim=-1)
    nearest = nearest_int8(x, torch.arange(1024, 4096), destination, 1 << 19)[1]
    every = scores(source, destination)
    assert (nearest == every.argmax(-1)).double().mean() > 0.9
    chosen = every.gather(-1, nearest[..., None])[..., 0]
    assert (every.amax(-1) - chosen).mean() < 1e-3 * (1 - every.amax(-1)).mean()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_any_magnitude(scale):
    x = tokens(1, 200, 16)
    sources, destination = torch.arange(50, 200), F.normalize(x[:, :50], dim=-1)
    plain = nearest_int8(x, sources, destination, 1 << 19)
    scaled = nearest_int8(x * scale, sources, destination, 1 << 19)
    assert torch.equal(plain[1], scaled[1])
    torch.testing.assert_close(plain[0], scaled[0])


def test_zeros_are_no_reason_to_stop():
    zeros = torch.zeros(1, 8, 8)
    similarity, nearest = nearest_int8(zeros, torch.arange(3, 8), zeros[:, :3], 100)
    assert not similarity.any()
    assert nearest.min() >= 0 and nearest.max() < 3


def test_matching_uses_it_only_when_asked_and_available(monkeypatch):
    metric = tokens(2, 256, 24)
    destinations, sources = random_layout(16, 16).select(0)
    calls = []

    def counted(*args):
        calls.append(args)
        return nearest_int8(*args)

    monkeypatch.setattr(int8_module, "nearest_int8", counted)
    monkeypatch.setattr(int8_module, "AVAILABLE", True)
    exact = bipartite_match(metric, destinations, sources, 128)
    assert not calls
    fast = bipartite_match(metric, destinations, sources, 128, exact=False)
    assert len(calls) == 1
    monkeypatch.setattr(int8_module, "AVAILABLE", False)
    elsewhere = bipartite_match(metric, destinations, sources, 128, exact=False)
    assert len(calls) == 1 and torch.equal(elsewhere.slot, exact.slot)

    def distance(plan):
        return (plan.unmerge(plan.merge(metric)) - metric).square().mean()

    assert fast.num_slots == exact.num_slots and int(fast.size.sum()) == 512
    assert distance(fast) < 1.02 * distance(exact)


def test_the_edges_that_merge_are_ranked_in_full_precision(monkeypatch):
    """Where the choice of destinations is beyond doubt, the plan is that of full precision."""
    monkeypatch.setattr(int8_module, "AVAILABLE", True)
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    metric = centres.repeat_interleave(4, 0) + 0.02 * torch.randn(256, 64, generator=generator)
    metric = metric[None]
    destinations = torch.arange(0, 256, 4)
    sources = torch.tensor([i for i in range(256) if i % 4])
    exact = bipartite_match(metric, destinations, sources, 100)
    fast = bipartite_match(metric, destinations, sources, 100, exact=False)
    assert torch.equal(fast.slot, exact.slot)
