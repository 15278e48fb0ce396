# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch

from mmagic_tome.merging import MergePlan
from mmagic_tome.merging.beside import BesidePlan, apart, beside, together

SLOT = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]])
# Where the picture begins, in sequences of four of its tokens and three others.
PLACES = [None, 0, 1, 3, [2, 2], [0, 3], [1, 2]]


@pytest.mark.parametrize("before", PLACES, ids=str)
def test_the_others_stay_where_they_are(before):
    inner = MergePlan(SLOT, 3)
    plan = BesidePlan(inner, 3, before)
    assert (plan.batch, plan.num_tokens, plan.num_slots) == (2, 7, 6)
    x = torch.randn(2, 7, 5)
    merged = plan.merge(x)
    back = plan.unmerge(merged)
    starts = before if isinstance(before, list) else [3 if before is None else before] * 2
    for entry, start in enumerate(starts):
        alone = MergePlan(SLOT[entry : entry + 1], 3)
        picture = alone.merge(x[entry : entry + 1, start : start + 4])
        assert torch.equal(merged[entry, start : start + 3], picture[0])
        assert torch.equal(back[entry, start : start + 4], alone.unmerge(picture)[0])
        for made, length in ((merged, 3), (back, 4)):
            assert torch.equal(made[entry, :start], x[entry, :start])
            assert torch.equal(made[entry, start + length :], x[entry, start + 4 :])


@pytest.mark.parametrize("before", PLACES, ids=str)
def test_who_stands_for_a_slot(before):
    plan = BesidePlan(MergePlan(SLOT, 3, torch.tensor([[2], [3]])), 3, before)
    starts = before if isinstance(before, list) else [3 if before is None else before] * 2
    for entry, start in enumerate(starts):
        kept = plan.representative[entry]
        assert torch.equal(kept[:start], torch.arange(start))
        assert torch.equal(kept[start + 3 :], torch.arange(start + 4, 7))
        inner = plan.plan.representative[entry]
        assert torch.equal(kept[start : start + 3], inner + start)


@pytest.mark.parametrize("before", PLACES[1:], ids=str)
def test_apart_and_together(before):
    x = torch.randn(2, 7, 5)
    others, tokens = apart(x, 3, before)
    assert others.shape == (2, 3, 5) and tokens.shape == (2, 4, 5)
    assert torch.equal(together(others, tokens, before), x)


def test_who_stands_for_a_slot_without_others():
    assert MergePlan(SLOT, 3).representative.tolist() == [[0, 1, 3], [3, 2, 0]]  # the first of each
    plan = MergePlan(SLOT, 3, torch.tensor([[2], [3]]))
    assert plan.representative.tolist() == [[2, 1, 3], [3, 2, 0]]


def test_nothing_beside():
    plan = MergePlan(SLOT, 3)
    assert beside(plan, 4) is plan
    assert beside(plan, 6).count == 2
