# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The published functions of ToMe; the matching itself is in test_sequence."""

import pytest
import torch

from mmagic_tome.merging import (
    bipartite_soft_matching,
    kth_bipartite,
    match_tokens,
    merge_source,
    merge_wavg,
    random_bipartite,
)

MATCHINGS = {
    "bipartite": lambda x: bipartite_soft_matching(x, 7, class_token=True),
    "distilled": lambda x: bipartite_soft_matching(x, 7, class_token=True, distill_token=True),
    "kth": lambda x: kth_bipartite(x, 2),
    "nothing": lambda x: kth_bipartite(x, 1),
    "random": lambda x: random_bipartite(x, 5, seed=3),
}


def tokens_of(batch, tokens, channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("flags", [(False, False), (True, False), (True, True)])
def test_merge_and_unmerge_are_those_of_the_matching(flags):
    metric, x = tokens_of(2, 11), tokens_of(2, 11, 3, seed=1)
    merge, unmerge = bipartite_soft_matching(metric, 4, *flags)
    plan = match_tokens(metric, 4, sum(flags))
    assert torch.equal(merge.plan.slot, plan.slot)
    for mode, same in (("mean", "mean"), ("sum", "sum"), ("amax", "max")):
        assert torch.equal(merge(x, mode=mode), plan.merge(x, same))
    dropped = x.gather(1, plan.representative[..., None].expand(-1, -1, 3))
    assert torch.equal(merge(x, mode="drop"), dropped)
    assert torch.equal(unmerge(merge(x)), plan.unmerge(plan.merge(x)))


@pytest.mark.parametrize(("tokens", "r", "removed"), [(2, 1, 0), (3, 1, 0), (4, 9, 1), (11, 4, 4)])
def test_a_distillation_token_alone_stays_second(tokens, r, removed):
    x = tokens_of(2, tokens)
    merge, unmerge = bipartite_soft_matching(x, r, distill_token=True)
    merged = merge(x)
    assert merged.shape[1] == tokens - removed and unmerge(merged).shape == x.shape
    assert torch.equal(merged[:, 1], x[:, 1])
    if removed:
        assert (merge.plan.slot == 1).sum(1).tolist() == [1, 1]
        kept = x.gather(1, merge.plan.representative[..., None].expand(-1, -1, 5))
        assert torch.equal(merge(x, mode="drop"), kept)


def check_nearest(plan, x, kept):
    """Every token that is not kept merges into the most similar of those that are."""
    for i in range(2):
        unit = x[i] / x[i].norm(dim=1, keepdim=True)
        assert plan.representative[i].tolist() == kept
        assert torch.equal(plan.slot[i], (unit @ unit[kept].T).argmax(dim=1))


def test_kth_keeps_every_kth():
    x = tokens_of(2, 11)
    for k in range(2, 12):
        merge, unmerge = kth_bipartite(x, k)
        check_nearest(merge.plan, x, list(range(k - 1, 11, k)))
        assert unmerge(merge(x)).shape == x.shape


def test_random_draws_the_sources():
    x = tokens_of(2, 11)
    state = torch.get_rng_state()
    plans = [random_bipartite(x, 4, seed=seed)[0].plan for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), state)
    kept = plans[5].representative[0].tolist()
    assert len(set(kept)) == 7 and sorted(kept) == kept
    check_nearest(plans[5], x, kept)
    assert len({tuple(plan.representative[0].tolist()) for plan in plans}) > 10
    assert random_bipartite(x, 100)[0](x).shape == (2, 1, 5)
    assert random_bipartite(x, 0)[0](x) is x


@pytest.mark.parametrize("name", MATCHINGS)
def test_weighted_average_over_layers_is_that_of_the_first_tokens(name):
    x = first = tokens_of(2, 29)
    size = source = None
    for _ in range(3):
        merge, unmerge = MATCHINGS[name](x)
        source = merge_source(merge, x, source)
        x, size = merge_wavg(merge, x, size)
    assert torch.equal(source.sum(1), torch.ones(2, 29))
    assert torch.equal(source.sum(2).double(), size[..., 0].double())
    torch.testing.assert_close(x, source.double() @ first / size)
    # Functions of somebody else's that behave like these are served by the definition.
    other = lambda x, mode="mean": merge(x, mode)  # noqa: E731
    y = tokens_of(2, unmerge(x).shape[1], 3, seed=9)
    weight = 1 + tokens_of(2, y.shape[1], 1, seed=4).abs()
    for own, theirs in zip(merge_wavg(merge, y, weight), merge_wavg(other, y, weight)):
        torch.testing.assert_close(own.double(), theirs.double())


def test_wrong_requests():
    x = tokens_of(1, 6)
    merging, nothing = bipartite_soft_matching(x, 1)[0], bipartite_soft_matching(x, 0)[0]
    assert nothing(x) is x
    for wrong, said in (
        (lambda: bipartite_soft_matching(x[0], 1), "metric must be"),
        (lambda: kth_bipartite(x[0], 2), "metric must be"),
        (lambda: random_bipartite(x[0], 2), "metric must be"),
        (lambda: kth_bipartite(x, 0), r"k must be in \[1, N=6\]"),
        (lambda: kth_bipartite(x, 7), r"k must be in \[1, N=6\]"),
        (lambda: merging(x, mode="median"), "mode must be one of"),
        (lambda: nothing(x, mode="median"), "mode must be one of"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
