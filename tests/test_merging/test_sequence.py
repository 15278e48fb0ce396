# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch

from mmagic_tome.merging.sequence import (
    COMBINATIONS,
    DISTANCES,
    PARTITIONS,
    combine,
    match_tokens,
    total_size,
)


def scores(x, distance, b):
    """Similarities of (N, C) tokens to those of B, by their definitions."""
    dot, length = x @ x[b].T, x.norm(dim=1)
    return {
        "dot": dot,
        "cosine": dot / (length[:, None] * length[b]),
        "euclidean": -(x[:, None] - x[b]).norm(dim=-1),
        "softmax": (dot / x.shape[1] ** 0.5).softmax(dim=1),
    }[distance]


def brute_force(metric, r, prefix, distance, a, b):
    """The paper's matching of one batch entry: the tokens of every slot, its own first.

    An edge from every token of A to the most similar of B; merge along the r most similar edges;
    concatenate protected tokens, A and B.
    """
    best, nearest = scores(metric, distance, b).max(dim=1)
    edges = [(float(best[i]), i, b[nearest[i]]) for i in a]
    gone = {i: j for _, i, j in sorted(edges, key=lambda edge: -edge[0])[:r]}
    order = [*range(prefix), *[i for i in a if i not in gone], *b]
    return [[place, *[i for i in sorted(gone) if gone[i] == place]] for place in order]


def groups(plan, entry):
    slots = plan.slot[entry].tolist()
    return [
        [place, *[i for i, slot in enumerate(slots) if slot == m and i != place]]
        for m, place in enumerate(plan.representative[entry].tolist())
    ]


def tokens_of(batch, tokens, channels=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, channels, generator=generator, dtype=dtype)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
def test_is_the_matching_of_the_paper(distance, partition, prefix):
    for tokens in (1, 2, 3, 4, 5, 11, 15):
        metric, rest = tokens_of(2, tokens, seed=tokens), list(range(prefix, tokens))
        half = len(rest) // 2
        for r in (0, 1, 3, 100):
            plan = match_tokens(metric, r, prefix, distance, partition, seed=7, stream=1)
            if r == 0 or half == 0:
                assert plan is None
                continue
            a, b = [t for t in rest if t % 2 == 0], [t for t in rest if t % 2]
            if partition == "sequential":
                a, b = rest[:half], rest[half:]
            elif partition == "random":
                # B must be read off the result; that it depends on the seed alone is tested below.
                b = plan.representative[0, half - len(rest) :].tolist()
                a = [t for t in rest if t not in b]
                assert sorted(b) == b and len(a) == half
            for i in range(2):
                r = min(r, half)
                assert groups(plan, i) == brute_force(metric[i], r, prefix, distance, a, b)


def test_random_partition_is_a_hash_of_its_seed():
    metric, random = tokens_of(2, 40), dict(r=9, prefix=1, partition="random")
    state = torch.get_rng_state()
    keys = (0, 0), (0, 0), (1, 0), (0, 1)
    slots = [match_tokens(metric, seed=s, stream=t, **random).slot for s, t in keys]
    assert [torch.equal(slots[0], slot) for slot in slots[1:]] == [True, False, False]
    assert torch.equal(torch.get_rng_state(), state)
    for wrong in (dict(distance="manhattan"), dict(partition="halves")):
        with pytest.raises(ValueError, match="must be one of"):
            match_tokens(metric, 1, **wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_combinations_by_hand(dtype):
    metric = tokens_of(2, 12, dtype=dtype)
    plan = match_tokens(metric, 4, 1)
    assert torch.equal(plan.slot, match_tokens(metric.double(), 4, 1).slot)
    x, size = tokens_of(2, 12, 3, seed=1).to(dtype), 1 + tokens_of(2, 12, 1, seed=2)[..., 0].abs()
    close = dict.fromkeys(("rtol", "atol"), 8 * torch.finfo(dtype).eps)
    for how in COMBINATIONS:
        found = combine(plan, x, size, how)
        assert found.dtype == dtype
        for i in range(2):
            for slot, group in enumerate(groups(plan, i)):
                rows, weights = x[i, group].double(), size[i, group, None]
                expected = {
                    "weighted": (weights * rows).sum(0) / weights.sum(),
                    "mean": rows.mean(0),
                    "max": rows.amax(0),
                    "drop": rows[0],
                }[how]
                torch.testing.assert_close(found[i, slot].double(), expected, **close)
    # Sums of many large tokens that half precision cannot hold.
    large, fifty = torch.full_like(metric, 6e4), torch.full((2, 12), 50.0)
    merged = combine(plan, large, fifty)
    rtol = 2e-3 if dtype.itemsize > 2 else 1e-2
    torch.testing.assert_close(merged, large[:, :8], rtol=rtol, atol=0)
    assert total_size(plan, fifty).sum() == 2 * 12 * 50
