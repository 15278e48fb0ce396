# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import bipartite_match, int8, random_layout
from mmagic_tome.merging.int8 import nearest_int8


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
    chosen = every.gather(-1, nearest[..., None])[..., 0]
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(similarity.double(), chosen, rtol=tolerance, atol=tolerance)
    # Two roundings of at most half a level of the largest entry, over all channels.
    assert (every.amax(-1) - chosen).max() < 2 * channels**0.5 / 127


@pytest.mark.parametrize("scale", [1e-15, 1e15, 0])
def test_any_magnitude(scale):
    x = tokens(1, 200, 16)
    sources, destination = torch.arange(50, 200), F.normalize(x[:, :50], dim=-1)
    plain = nearest_int8(x, sources, destination, 1 << 19)
    similarity, nearest = nearest_int8(x * scale, sources, destination * bool(scale), 1 << 19)
    if scale:
        assert torch.equal(plain[1], nearest)
        torch.testing.assert_close(plain[0], similarity)
    else:
        assert not similarity.any() and nearest.min() >= 0 and nearest.max() < 50


def test_matching_uses_it_only_when_asked_and_available(monkeypatch):
    metric, layout = tokens(2, 256, 24), random_layout(16, 16).select(0)
    with patch.object(int8, "nearest_int8", wraps=nearest_int8) as used:
        monkeypatch.setattr(int8, "AVAILABLE", True)
        exact = bipartite_match(metric, *layout, 128)
        assert not used.called
        fast = bipartite_match(metric, *layout, 128, exact=False)
        assert used.call_count == 1
        monkeypatch.setattr(int8, "AVAILABLE", False)
        elsewhere = bipartite_match(metric, *layout, 128, exact=False)
    assert used.call_count == 1 and torch.equal(elsewhere.slot, exact.slot)

    def distance(plan):
        return (plan.unmerge(plan.merge(metric)) - metric).square().mean()

    assert fast.num_slots == exact.num_slots and int(fast.size.sum()) == 512
    assert distance(fast) < 1.02 * distance(exact)
