# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch

from mmagic_tome.merging import (
    JointPlan,
    MergePlan,
    join_sequence,
    joint_plan,
    split_sequence,
)

SLOT = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]])
# Where the image begins, in sequences of four image and three text tokens.
PLACES = [None, 0, 1, 3, [2, 2], [0, 3], [1, 2]]


def starts_of(num_before):
    return (
        num_before
        if isinstance(num_before, list)
        else [3 if num_before is None else num_before] * 2
    )


@pytest.mark.parametrize("num_before", PLACES, ids=str)
def test_the_text_stays_where_it_is(num_before):
    inner = MergePlan(SLOT, 3)
    plan = JointPlan(inner, 3, num_before)
    assert (plan.batch, plan.num_tokens, plan.num_slots) == (2, 7, 6)
    x = torch.randn(2, 7, 5)
    merged = plan.merge(x)
    back = plan.unmerge(merged)
    for entry, start in enumerate(starts_of(num_before)):
        alone = MergePlan(SLOT[entry : entry + 1], 3)
        image = alone.merge(x[entry : entry + 1, start : start + 4])
        assert torch.equal(merged[entry, start : start + 3], image[0])
        assert torch.equal(back[entry, start : start + 4], alone.unmerge(image)[0])
        for made, length in ((merged, 3), (back, 4)):
            assert torch.equal(made[entry, :start], x[entry, :start])
            assert torch.equal(made[entry, start + length :], x[entry, start + 4 :])


@pytest.mark.parametrize("num_before", PLACES, ids=str)
def test_indices_count_the_text(num_before):
    inner = MergePlan(SLOT, 3, torch.tensor([[2], [3]]))
    plan = JointPlan(inner, 3, num_before)
    for entry, start in enumerate(starts_of(num_before)):
        kept, slot, size = plan.representative[entry], plan.slot[entry], plan.size[entry]
        assert torch.equal(kept[:start], torch.arange(start))
        assert torch.equal(kept[start + 3 :], torch.arange(start + 4, 7))
        assert torch.equal(kept[start : start + 3], inner.representative[entry] + start)
        assert torch.equal(slot[:start], torch.arange(start))
        assert torch.equal(slot[start + 4 :], torch.arange(start + 3, 6))
        assert torch.equal(slot[start : start + 4], inner.slot[entry] + start)
        assert torch.equal(size[start : start + 3], inner.size[entry])
        assert torch.equal(size, slot.bincount(minlength=6))
    assert plan.slot.dtype == plan.size.dtype == plan.representative.dtype == torch.int64


@pytest.mark.parametrize("num_before", PLACES[1:], ids=str)
def test_split_and_join(num_before):
    x = torch.randn(2, 7, 5)
    text, image = split_sequence(x, 3, num_before)
    assert text.shape == (2, 3, 5) and image.shape == (2, 4, 5)
    assert torch.equal(join_sequence(text, image, num_before), x)


def test_a_sequence_without_text():
    plan = MergePlan(SLOT, 3)
    assert joint_plan(plan, 4) is plan
    joint = joint_plan(plan, 6, 1)
    assert (joint.num_text_tokens, joint.num_before) == (2, 1)
    assert repr(joint) == "JointPlan(2 text tokens, MergePlan(batch=2, 4 -> 3 tokens))"
