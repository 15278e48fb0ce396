# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import MlerpPlan, PrunedPlan


def test_pruning_keeps_the_destination_or_the_first_token():
    slot = torch.tensor([[0, 0, 1, 1, 2]])
    x = torch.arange(5.0).view(1, 5, 1)
    assert PrunedPlan(slot, 3).merge(x).flatten().tolist() == [0, 2, 4]
    plan = PrunedPlan(slot, 3, torch.tensor([3]))
    assert plan.merge(x).flatten().tolist() == [0, 3, 4]
    assert plan.unmerge(plan.merge(x)).flatten().tolist() == [0, 0, 3, 3, 4]
    assert plan.merge(x.long()).dtype == torch.int64  # nothing is computed


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(0, 10**6))
def test_mlerp_by_hand(count, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = int(torch.randint(1, count + 1, (), generator=generator))
    rest = torch.randint(slots, (count - slots,), generator=generator)
    slot = torch.cat([torch.arange(slots), rest])[torch.randperm(count, generator=generator)]
    x = torch.randn(1, count, 5, generator=generator, dtype=torch.float64)
    merged = MlerpPlan(slot[None], slots).merge(x)[0]
    for s in range(slots):
        group = x[0, slot == s]
        mean = group.mean(0)
        expected = mean / mean.norm() * group.norm(dim=1).max()
        torch.testing.assert_close(merged[s], expected)


def test_mlerp_of_tokens_that_cancel_is_zero_and_of_large_half_ones_finite():
    plan = MlerpPlan(torch.tensor([[0, 0, 1]]), 2)
    x = torch.tensor([[[1.0, 0], [-1, 0], [3, 4]]])
    torch.testing.assert_close(plan.merge(x), torch.tensor([[[0.0, 0], [3, 4]]]))
    half = torch.full((1, 3, 64), 3e4, dtype=torch.float16)
    assert half.norm(dim=-1).isinf().all()  # what a length in half precision would be
    assert torch.equal(plan.merge(half), half[:, :2])


def test_mlerp_gradient():
    plan = MlerpPlan(torch.tensor([[0, 1, 0, 1, 1]]), 2)
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.merge, (x,))


def test_pruned_gradient_reaches_the_kept_tokens_only():
    plan = PrunedPlan(torch.tensor([[0, 1, 0]]), 2, torch.tensor([2]))
    x = torch.randn(1, 3, 2, requires_grad=True)
    plan.unmerge(plan.merge(x)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[[0.0, 0], [1, 1], [2, 2]]]))
