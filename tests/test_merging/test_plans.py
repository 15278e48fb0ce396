# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Plans: what every class of them promises, and what each does with its tokens."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import (
    FramePlan,
    JointPlan,
    MergePlan,
    Plan,
    PrunedPlan,
    join_sequence,
    joint_plan,
    split_sequence,
)
from mmagic_tome.merging.plan import entry_indices, flat_rows

B, N, M = 2, 24, 10


def slots(batch=B, tokens=N, count=M, seed=0):
    """Every slot used at least once, the rest anywhere, shuffled per batch entry."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(count, (batch, tokens - count), generator=generator)
    slot = torch.cat([torch.arange(count).expand(batch, -1), rest], dim=1)
    return torch.stack([row[torch.randperm(tokens, generator=generator)] for row in slot])


PLANS = {
    "merge": lambda: MergePlan(slots(), M),
    "merge with destinations": lambda: MergePlan(slots(), M, torch.tensor([[3], [5]])),
    "prune": lambda: PrunedPlan(slots(), M),
    "joint": lambda: JointPlan(MergePlan(slots(), M), 5),
    "joint, image first": lambda: JointPlan(PrunedPlan(slots(), M), 5, 0),
    "joint, by entry": lambda: JointPlan(MergePlan(slots(), M), 5, [1, 4]),
    "frames": lambda: FramePlan(MergePlan(slots(), M), 3),
}
every_plan = pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)


@every_plan
def test_attributes(make):
    plan = make()
    assert all(hasattr(plan, name) for name in (*Plan.__annotations__, "merge", "unmerge"))
    frames = getattr(plan, "num_frames", 1)
    rows, tokens, count = plan.batch // frames, plan.num_tokens * frames, plan.num_slots
    assert plan.slot.shape == (rows, tokens) and plan.size.shape == (rows, count)
    assert plan.representative.shape == (rows, count)
    assert plan.slot.dtype == plan.representative.dtype == torch.int64
    assert plan.slot.min() >= 0 and plan.slot.max() < count
    assert plan.representative.min() >= 0 and plan.representative.max() < tokens
    for slot, size in zip(plan.slot, plan.size):
        assert torch.equal(slot.bincount(minlength=count), size)
    own = plan.slot.gather(1, plan.representative)
    assert torch.equal(own, torch.arange(count).expand(rows, -1))


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(make, dtype):
    plan = make()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(plan.batch, plan.num_tokens, 4, generator=generator).to(dtype)
    merged = plan.merge(x)
    assert merged.shape == (plan.slot.shape[0], plan.num_slots, 4) and merged.dtype == dtype
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(plan.merge(view), merged)
    back = plan.unmerge(merged)
    assert back.shape == x.shape and back.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2}.get(dtype, 1e-4)
    same = x[:1, :1].expand_as(x)
    torch.testing.assert_close(plan.unmerge(plan.merge(same)), same, rtol=tolerance, atol=tolerance)
    # Copies of a slot merge into it again, and unmerging gathers by slot.
    torch.testing.assert_close(plan.merge(back), merged, rtol=tolerance, atol=tolerance)
    index = plan.slot[..., None].expand(-1, -1, 4)
    assert torch.equal(back, merged.gather(1, index).view_as(back))
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(other.merge(x), merged)
        assert torch.equal(other.representative, plan.representative)


@every_plan
def test_gradients_and_wrong_shapes(make):
    plan = make()
    generator = torch.Generator().manual_seed(0)
    shape = plan.batch, plan.num_tokens, 2
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: plan.unmerge(plan.merge(x).sin()), (x,))
    with pytest.raises(ValueError, match="merge expects"):
        plan.merge(torch.zeros(plan.batch, plan.num_tokens + 3, 2))
    with pytest.raises(ValueError, match="unmerge expects"):
        plan.unmerge(torch.zeros(plan.batch, plan.num_slots + 3, 2))


# --- plans of indices -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_a_slot_holds_by_brute_force(batch, tokens, seed, dtype):
    count = seed % tokens + 1
    slot = slots(batch, tokens, count, seed)
    x = torch.randn(batch, tokens, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    pruned, x64 = PrunedPlan(slot, count), x.double()
    found = {mode: MergePlan(slot, count).merge(x, mode) for mode in ("mean", "sum", "max")}
    found["prune"] = pruned.merge(x)
    reductions = dict(
        mean=lambda group: group.mean(0),
        sum=lambda group: group.sum(0),
        max=lambda group: group.amax(0),
        prune=lambda group: group[0],
    )
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-5)
    for mode, reduce in reductions.items():
        for b in range(batch):
            expected = torch.stack([reduce(x64[b, slot[b] == s]) for s in range(count)])
            close = dict(rtol=tolerance, atol=10 * tolerance)
            torch.testing.assert_close(found[mode][b].double(), expected, **close)
    assert torch.equal(found["prune"].long(), pruned.merge(x.long()))


@pytest.mark.parametrize("make", [MergePlan, PrunedPlan])
def test_what_a_plan_keeps_is_small(make):
    """Plans of all blocks may be kept for several steps: no 64-bit copy of the slots."""
    plan = make(slots(2, 64, 32), 32)
    names = {name for kind in type(plan).__mro__ for name in getattr(kind, "__slots__", ())}
    held = [getattr(plan, name) for name in names]
    held = [one.numel() * one.element_size() for one in held if isinstance(one, torch.Tensor)]
    assert sum(held) <= 2 * (64 + 64 + 32) * 4


def test_rows_that_32_bits_cannot_count():
    index = torch.tensor([[0, 5], [1, 2]])
    assert flat_rows(index, 10).dtype == torch.int32
    large = flat_rows(index, 2**30)
    assert torch.equal(entry_indices(large, (2, 2), 2**30), index)
    assert large.dtype == torch.int64 and large.tolist() == [0, 5, 2**30 + 1, 2**30 + 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_tokens_are_summed_in_single_precision(dtype):
    slot = torch.zeros(1, 4096, dtype=torch.int64)
    slot[0, 0] = 1
    x = torch.ones(1, 4096, 1, dtype=dtype, requires_grad=True)
    y = MergePlan(slot, 2).merge(x)
    y.retain_grad()
    MergePlan(slot, 2).unmerge(y).sum().backward()
    # One by one in half precision the sum would stay at 256 or 2048.
    assert y.grad.flatten().tolist() == [torch.tensor(4095.0).to(dtype).item(), 1]
    assert x.grad.eq(1).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MergePlan(torch.zeros(4, dtype=torch.int64), 1), "slot must be"),
        (lambda: MergePlan(torch.zeros(1, 4), 1), "slot must be"),
        (lambda: PrunedPlan(torch.zeros(1, 4, dtype=torch.int64), 0), "num_slots must be"),
        (lambda: MergePlan(torch.zeros(1, 4, dtype=torch.int64), 5), "num_slots must be"),
    ],
)
def test_bad_plans(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# --- joint sequences and clips --------------------------------------------------------------------


def test_a_clip_is_one_sequence_of_the_tokens_of_its_frames():
    slot = torch.tensor([[0, 0, 1, 1, 2, 2], [2, 1, 0, 0, 1, 2]])
    plan = FramePlan(MergePlan(slot, 3), num_frames=2)
    x = torch.arange(4 * 3 * 2.0).view(4, 3, 2)  # two clips of two frames of three tokens
    merged = plan.merge(x)
    # The second slot of the first clip: the last token of its first frame, the first of its second.
    torch.testing.assert_close(merged[0, 1], (x[0, 2] + x[1, 0]) / 2)
    torch.testing.assert_close(plan.unmerge(merged)[1, 0], merged[0, 1])


# Where the image begins, in sequences of four image and three text tokens.
@pytest.mark.parametrize("num_before", [None, 0, 1, 3, [2, 2], [0, 3], [1, 2]], ids=str)
def test_the_text_stays_where_it_is(num_before):
    slot = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]])
    inner = MergePlan(slot, 3, torch.tensor([[2], [3]]))
    plan = JointPlan(inner, 3, num_before)
    assert (plan.batch, plan.num_tokens, plan.num_slots) == (2, 7, 6)
    x = torch.randn(2, 7, 5)
    merged = plan.merge(x)
    back = plan.unmerge(merged)
    first = [3 if num_before is None else num_before] * 2
    for b, start in enumerate(num_before if isinstance(num_before, list) else first):
        before, image, after = x[b].split([start, 4, 3 - start])
        alone = MergePlan(slot[b : b + 1], 3)
        image = alone.merge(image[None])
        assert torch.equal(merged[b], torch.cat([before, image[0], after]))
        assert torch.equal(back[b], torch.cat([before, alone.unmerge(image)[0], after]))
        kept = [*range(start), *(inner.representative[b] + start), *range(start + 4, 7)]
        assert plan.representative[b].tolist() == kept
        assert plan.slot[b].tolist() == [
            *range(start),
            *(inner.slot[b] + start),
            *range(start + 3, 6),
        ]
    if num_before is not None:
        text, image = split_sequence(x, 3, num_before)
        assert text.shape == (2, 3, 5) and image.shape == (2, 4, 5)
        assert torch.equal(join_sequence(text, image, num_before), x)
    assert joint_plan(inner, 4) is inner
    assert joint_plan(inner, 7, num_before).num_before == plan.num_before
