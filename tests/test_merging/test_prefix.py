# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import torch

from mmagic_tome.merging import MergePlan
from mmagic_tome.merging.prefix import PrefixedPlan


def test_tokens_in_front_stay():
    slot = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]])
    inner = MergePlan(slot, 3)
    plan = PrefixedPlan(inner, 2)
    assert (plan.batch, plan.num_tokens, plan.num_slots) == (2, 6, 5)
    x = torch.randn(2, 6, 3)
    merged = plan.merge(x)
    assert torch.equal(merged[:, :2], x[:, :2])
    assert torch.equal(merged[:, 2:], inner.merge(x[:, 2:]))
    back = plan.unmerge(merged)
    assert torch.equal(back[:, :2], x[:, :2])
    assert torch.equal(back[:, 2:], inner.unmerge(merged[:, 2:]))


def test_who_stands_for_a_slot():
    slot = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]])
    plan = MergePlan(slot, 3)
    assert plan.representative.tolist() == [[0, 1, 3], [3, 2, 0]]  # the first of each
    plan = MergePlan(slot, 3, torch.tensor([[2], [3]]))
    assert plan.representative.tolist() == [[2, 1, 3], [3, 2, 0]]
    assert PrefixedPlan(plan, 2).representative.tolist() == [[0, 1, 4, 3, 5], [0, 1, 5, 4, 2]]
