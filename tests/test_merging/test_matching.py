# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import tomesd.merge
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import (
    MergePlan,
    bipartite_match,
    grid_layout,
    nearest_destination,
    plan_of_edges,
    random_layout,
    regular_layout,
    strongest,
    tokens_to_remove,
)


def both(metric, h, w, sx, sy, ratio, seed=None, max_scores=None):
    """Our plan and tomesd's (merge, unmerge) on the same destination layout.

    tomesd draws the position inside each cell with ``torch.randint``; drawing it
    again from the same generator gives its layout.
    """
    r = int(h * w * ratio)
    if seed is None:
        layout = regular_layout(h, w, sx, sy)
        theirs = tomesd.merge.bipartite_soft_matching_random2d(
            metric, w, h, sx, sy, r, no_rand=True
        )
    else:
        generator = torch.Generator().manual_seed(seed)
        size = (h // sy, w // sx, 1)
        offset = torch.randint(sy * sx, size=size, generator=generator).view(1, -1)
        layout = grid_layout(offset, h, w, sx, sy)
        theirs = tomesd.merge.bipartite_soft_matching_random2d(
            metric, w, h, sx, sy, r, generator=torch.Generator().manual_seed(seed)
        )
    destinations, sources = layout.select(0)
    r = tokens_to_remove(h * w, len(sources), ratio)
    return bipartite_match(metric, destinations, sources, r, max_scores), theirs


def sorted_rows(x):
    """Rows of each batch entry in an order that does not depend on that of the slots."""
    return torch.stack([rows[rows[:, 0].argsort()] for rows in x])


grids = st.tuples(
    st.integers(1, 3),
    st.integers(2, 20),
    st.integers(2, 20),
    st.sampled_from([(2, 2), (1, 2), (2, 1), (3, 2), (4, 4), (2, 3)]),
    st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.75, 0.9]),
    st.one_of(st.none(), st.integers(0, 1000)),
)


@settings(deadline=None, max_examples=100)
@given(grids, st.sampled_from([torch.float32, torch.float64]))
def test_equals_tomesd(grid, dtype):
    batch, h, w, (sx, sy), ratio, seed = grid
    if h < sy or w < sx or int(h * w * ratio) == 0:
        return
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    metric = torch.randn(batch, h * w, 8, generator=generator, dtype=torch.float64).to(dtype)
    plan, (merge, unmerge) = both(metric, h, w, sx, sy, ratio, seed)
    x = torch.randn(batch, h * w, 6, generator=generator, dtype=torch.float64).to(dtype)
    merged = merge(x)
    assert plan.num_slots == merged.shape[1]
    torch.testing.assert_close(sorted_rows(plan.merge(x)), sorted_rows(merged))
    # A row-wise function in between: the whole effect on a model's features.
    torch.testing.assert_close(plan.unmerge(plan.merge(x).sin()), unmerge(merged.sin()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (9, 21)])
def test_equals_tomesd_in_half_precision_where_the_choice_is_clear(dtype, h, w):
    # What merges, and with whom, is decided by margins that half precision cannot blur:
    # r sources at cosine 0.98 to one destination, the others at 0.5, all else near 0.
    generator = torch.Generator().manual_seed(3)
    destinations, sources = regular_layout(h, w).select(0)
    r = int(h * w * 0.5)
    metric = torch.randn(2, h * w, 512, generator=generator)
    target = destinations[torch.randint(len(destinations), (len(sources),), generator=generator)]
    share = torch.full((len(sources), 1), 1.7)  # noise of that length: cosine 0.5
    share[torch.randperm(len(sources), generator=generator)[:r]] = 0.2
    metric[:, sources] = metric[:, target] + share * metric[:, sources]
    metric = metric.to(dtype)
    plan, (merge, unmerge) = both(metric, h, w, 2, 2, 0.5)
    x = torch.randn(2, h * w, 6, generator=generator).to(dtype)
    ours, theirs = plan.unmerge(plan.merge(x)), unmerge(merge(x))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_reached_in_half_precision_equals_tomesd(dtype):
    # In half precision many destinations tie and the winner is arbitrary: what must be
    # equal is how similar the merged tokens are.
    metric = torch.randn(2, 32 * 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan, (merge, unmerge) = both(metric, 32, 32, 2, 2, 0.5, seed=9)

    def error(restored):
        return F.mse_loss(restored.float(), metric.float()).item()

    ours, theirs = error(plan.unmerge(plan.merge(metric))), error(unmerge(merge(metric)))
    assert theirs > 0.1 and ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("max_scores", [1, 50, 1000, 10**9])
def test_chunks_change_nothing(max_scores):
    metric = torch.randn(2, 17 * 11, 8)
    whole, _ = both(metric, 17, 11, 2, 2, 0.5)
    chunked, _ = both(metric, 17, 11, 2, 2, 0.5, max_scores=max_scores)
    assert torch.equal(whole.slot, chunked.slot)


def test_scores_of_all_pairs_are_never_held(monkeypatch):
    largest = 0
    bmm = torch.bmm

    def watched(a, b):
        nonlocal largest
        out = bmm(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "bmm", watched)
    metric = torch.randn(2, 64 * 64, 4)
    destinations, sources = regular_layout(64, 64).select(0)
    bipartite_match(metric, destinations, sources, 2048)  # as the engine calls it
    assert 0 < largest <= 2**19 < 2 * 3072 * 1024
    largest = 0
    bipartite_match(metric, destinations, sources, 2048, max_scores=100_000)
    assert 0 < largest <= 100_000


def test_best_edges_are_the_ones_that_merge():
    # One destination (token 0) and three sources at growing angles.
    angles = torch.tensor([0.0, 0.3, 0.1, 1.0])
    metric = (
        torch.stack([angles.cos(), angles.sin()], -1)[None]
        * torch.tensor([1, 5, 0.1, 2.0])[None, :, None]
    )
    plan = bipartite_match(metric, torch.tensor([0]), torch.tensor([1, 2, 3]), 1)
    slot = plan.slot[0]
    assert slot[2] == slot[0] == 0 and len({*slot.tolist()}) == 3  # cosine ignores length


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_token_does_not_draw_all_others(dtype):
    metric = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    destinations, sources = regular_layout(8, 8).select(0)
    metric[:, destinations[3]] = 0
    metric[:, sources[5]] = 0
    plan = bipartite_match(metric, destinations, sources, 32)
    assert int(plan.size.max()) < 12
    assert int(plan.size[:, 3].max()) <= 2  # slot 3 is that destination


@pytest.mark.parametrize(("h", "w", "ratio"), [(33, 31, 0.5), (17, 90, 0.75), (8, 200, 0.3)])
def test_counts(h, w, ratio):
    layout = random_layout(h, w)
    destinations, sources = layout.select(0)
    r = tokens_to_remove(h * w, len(sources), ratio)
    plan = bipartite_match(torch.randn(3, h * w, 4), destinations, sources, r)
    assert plan.num_slots == h * w - min(int(h * w * ratio), len(sources))
    assert int(plan.size.min()) >= 1
    assert int(plan.slot.max()) == plan.num_slots - 1


def test_no_gradient_flows_through_matching():
    metric = torch.randn(1, 16, 4, requires_grad=True)
    plan = bipartite_match(metric, *regular_layout(4, 4).select(0), 8)
    assert not plan.slot.requires_grad


@pytest.mark.parametrize(
    ("destinations", "sources", "r", "message"),
    [
        ([], [0, 1, 2, 3], 1, "at least one destination"),
        ([0], [1, 2], 1, "!= 4 tokens"),
        ([0], [1, 2, 3], 4, r"r must be in \[0, 3\]"),
        ([0], [1, 2, 3], -1, r"r must be in \[0, 3\]"),
    ],
)
def test_bad_arguments(destinations, sources, r, message):
    with pytest.raises(ValueError, match=message):
        bipartite_match(
            torch.randn(1, 4, 2),
            torch.tensor(destinations, dtype=torch.int64),
            torch.tensor(sources, dtype=torch.int64),
            r,
        )


@pytest.mark.parametrize("exact", [True, False])
def test_tokens_that_are_a_view_of_an_image(exact):
    """As they come out of a convolution: channels far apart in memory."""
    image = torch.randn(2, 24, 16, 16, generator=torch.Generator().manual_seed(0))
    view = image.permute(0, 2, 3, 1).reshape(2, 256, 24)
    assert not view.is_contiguous()
    layout = random_layout(16, 16).select(0)
    plan = bipartite_match(view, *layout, 128, exact=exact)
    assert torch.equal(
        plan.slot, bipartite_match(view.contiguous(), *layout, 128, exact=exact).slot
    )


# --- the steps of the matching ------------------------------------------------------------------


def test_strongest_takes_the_first_among_equals():
    score = torch.tensor([[1.0, 3, 3, 3, 2]])
    assert strongest(score, 2).tolist() == [[False, True, True, False, False]]


def test_plan_of_edges_refuses_an_unknown_reduction():
    one = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduction"):
        plan_of_edges(one[0], one[0] + 1, one, one == 0, 1, "median")


def reference_groups(metric, destinations, sources, r):
    """The matching in loops: tokens of every slot, as a set of sorted tuples per batch entry."""
    unit = F.normalize(metric.double(), dim=-1)
    result = []
    for entry in unit:
        edges = []
        for i in sources:
            scores = [float(entry[i] @ entry[j]) for j in destinations]
            best = max(range(len(scores)), key=scores.__getitem__)
            edges.append((scores[best], i, destinations[best]))
        edges.sort(key=lambda edge: -edge[0])
        groups = {j: [j] for j in destinations}
        for rank, (_, i, j) in enumerate(edges):
            groups[i if rank >= r else j] = [*groups.get(i if rank >= r else j, []), i]
        result.append({tuple(sorted(group)) for group in groups.values()})
    return result


def groups_of(plan):
    return [
        {tuple(torch.nonzero(slot == m)[:, 0].tolist()) for m in range(plan.num_slots)}
        for slot in plan.slot
    ]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(2, 6),
    st.integers(2, 6),
    st.floats(0, 1),
    st.integers(0, 10**6),
    st.sampled_from(["mean", "prune", "mlerp"]),
)
def test_equals_a_matching_in_loops(batch, h, w, share, seed, reduction):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, h * w, 5, generator=generator, dtype=torch.float64)
    destinations, sources = random_layout(h, w, seed=seed).select(0)
    r = int(share * len(sources))
    plan = bipartite_match(metric, destinations, sources, r, reduction=reduction)
    assert groups_of(plan) == reference_groups(metric, destinations.tolist(), sources.tolist(), r)
    # Slots: destinations, then the sources that stay, each in the order given.
    for entry in plan.representative.tolist():
        assert entry[: len(destinations)] == destinations.tolist()
        assert entry[len(destinations) :] == [i for i in sources.tolist() if i in entry]


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
        x = metric[b : b + 1]
        expected = other.unmerge(other.merge(x))
        assert torch.equal(plan.unmerge(plan.merge(metric))[b : b + 1], expected)


def test_every_entry_may_have_destinations_of_its_own():
    metric = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    layout = random_layout(6, 6, count=2)
    together = bipartite_match(metric, layout.destinations, layout.sources, 18)
    for b in range(2):
        alone = bipartite_match(metric[b : b + 1], *layout.select(b), 18)
        assert torch.equal(together.slot[b : b + 1], alone.slot)
        assert torch.equal(together.representative[b : b + 1], alone.representative)


def test_sources_that_stay_may_come_first():
    metric = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    destinations, sources = random_layout(6, 6).select(0)
    best, nearest = nearest_destination(metric, destinations, sources)
    edges = (destinations, sources, nearest, strongest(best, 10), 10)
    plan, other = plan_of_edges(*edges), plan_of_edges(*edges, destinations_first=False)
    rolled = plan.representative.roll(-len(destinations), dims=1)
    assert torch.equal(other.representative, rolled)
    assert torch.equal(plan.unmerge(plan.merge(metric)), other.unmerge(other.merge(metric)))
