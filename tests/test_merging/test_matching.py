# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import (
    MergePlan,
    bipartite_match,
    random_layout,
    regular_layout,
    strongest,
)


def test_scores_of_all_pairs_are_never_held(monkeypatch):
    held, bmm = [], torch.bmm

    def watched(a, b):
        held.append(a.shape[0] * a.shape[1] * b.shape[2])
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    metric = torch.randn(2, 64 * 64, 4)
    layout = regular_layout(64, 64).select(0)
    plan = bipartite_match(metric, *layout, 2048)  # as the engine calls it
    assert max(held) <= 2**19 < sum(held) == 2 * 3072 * 1024
    for bound in (50, 100_000, 10**9):  # less than a row, some rows, everything
        held.clear()
        monkeypatch.setattr("mmagic_tome.merging.matching._MAX_SCORES_CPU", bound)
        assert torch.equal(bipartite_match(metric, *layout, 2048).slot, plan.slot)
        assert max(held) <= max(bound, 2 * 1024) and sum(held) == 2 * 3072 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_token_does_not_draw_all_others(dtype):
    metric = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    destinations, sources = regular_layout(8, 8).select(0)
    metric[:, destinations[3]] = 0
    metric[:, sources[5]] = 0
    plan = bipartite_match(metric, destinations, sources, 32)
    assert int(plan.size.max()) < 12
    assert int(plan.size[:, 3].max()) <= 2  # slot 3 is that destination


@pytest.mark.parametrize(
    ("sources", "r", "message"),
    [
        ([1, 2], 1, "!= 4 tokens"),
        ([1, 2, 3], 4, r"r must be in \[0, 3\]"),
        ([1, 2, 3], -1, r"r must be in \[0, 3\]"),
    ],
)
def test_bad_arguments(sources, r, message):
    with pytest.raises(ValueError, match=message):
        bipartite_match(torch.randn(1, 4, 2), torch.tensor([0]), torch.tensor(sources), r)


@pytest.mark.parametrize("exact", [True, False])
def test_tokens_that_are_a_view_of_an_image(exact):
    """As they come out of a convolution: channels far apart in memory."""
    image = torch.randn(2, 24, 16, 16, generator=torch.Generator().manual_seed(0))
    view = image.permute(0, 2, 3, 1).reshape(2, 256, 24)
    assert not view.is_contiguous()
    layout = random_layout(16, 16).select(0)
    plan = bipartite_match(view, *layout, 128, exact=exact)
    expected = bipartite_match(view.contiguous(), *layout, 128, exact=exact)
    assert torch.equal(plan.slot, expected.slot)


def test_strongest_takes_the_first_among_equals():
    score = torch.tensor([[1.0, 3, 3, 3, 2]])
    assert strongest(score, 2).tolist() == [[False, True, True, False, False]]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 10**6),
)
def test_merged_and_restored_bits_are_those_of_a_plain_matching(h, w, share, dtype, seed):
    """Ranks, merges and averages with plain torch operations, in the order of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, h * w, 6, generator=generator).to(dtype)
    destinations, sources = random_layout(h, w, seed=seed).select(0)
    r = int(share * len(sources))
    plan = bipartite_match(metric, destinations, sources, r)
    dst = F.normalize(metric[:, destinations], dim=-1, eps=torch.finfo(dtype).tiny)
    src = metric[:, sources]
    best, nearest = torch.bmm(src, dst.transpose(1, 2)).max(dim=-1)
    best = best / torch.linalg.vector_norm(src, dim=-1)
    for b in range(2):
        rank = best[b].argsort(descending=True, stable=True).argsort()
        target = torch.arange(h * w)
        target[sources] = torch.where(rank < r, destinations[nearest[b]], sources)
        slot = target.unique(return_inverse=True)[1][None]
        other = MergePlan(slot, h * w - r)
        expected = other.unmerge(other.merge(metric[b : b + 1]))
        assert torch.equal(plan.unmerge(plan.merge(metric))[b : b + 1], expected)
        # Slots: destinations, then the sources that stay, each in the order given.
        stay = sources[rank >= r]
        assert torch.equal(plan.representative[b], torch.cat([destinations, stay]))
