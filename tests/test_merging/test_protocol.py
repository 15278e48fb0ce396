# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every class of plans satisfies the protocol."""

import copy
import pickle

import pytest
import torch

from mmagic_tome.merging import (
    FramePlan,
    JointPlan,
    MatrixPlan,
    MergePlan,
    MlerpPlan,
    Plan,
    PrunedPlan,
    make_windows,
)

B, N, M = 2, 24, 10


def slots(batch=B, tokens=N, slots=M, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(slots, (batch, tokens - slots), generator=generator)
    slot = torch.cat([torch.arange(slots).expand(batch, -1), rest], dim=1)
    return torch.stack([row[torch.randperm(tokens, generator=generator)] for row in slot])


def matrix_plan():
    windows = make_windows(5, 6, 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    groups, kept = B * windows.count, windows.size // 2
    weights = torch.rand(groups, kept, windows.size, generator=generator).softmax(-1)
    back = torch.rand(groups, windows.size, kept, generator=generator).softmax(-1)
    return MatrixPlan(weights, back, windows)


PLANS = {
    "merge": lambda: MergePlan(slots(), M),
    "merge with destinations": lambda: MergePlan(slots(), M, torch.tensor([[3], [5]])),
    "prune": lambda: PrunedPlan(slots(), M),
    "mlerp": lambda: MlerpPlan(slots(), M),
    "matrix": matrix_plan,
    "joint": lambda: JointPlan(MergePlan(slots(), M), 5),
    "joint, image first": lambda: JointPlan(PrunedPlan(slots(), M), 5, 0),
    "joint, by entry": lambda: JointPlan(MlerpPlan(slots(), M), 5, [1, 4]),
    "joint matrix": lambda: JointPlan(matrix_plan(), 3, 2),
    "frames": lambda: FramePlan(MergePlan(slots(), M), 3),
    "frames of a matrix": lambda: FramePlan(matrix_plan(), 2),
}
every_plan = pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)


def is_soft(plan):
    return isinstance(getattr(plan, "plan", plan), MatrixPlan)


@every_plan
def test_surface(make):
    plan = make()
    names = {name for name in vars(Plan) if not name.startswith("_")}
    assert names == {
        *("batch", "num_tokens", "num_slots", "slot", "size", "representative"),
        *("merge", "unmerge"),
    }
    for name in names:
        assert hasattr(plan, name)
    for name in ("batch", "num_tokens", "num_slots"):
        assert type(getattr(plan, name)) is int
    # Every slot of an instance is set.
    for kind in type(plan).__mro__[:-1]:
        for name in kind.__slots__:
            assert hasattr(plan, name)
    assert not hasattr(plan, "__dict__")


@every_plan
def test_indices_and_sizes(make):
    plan = make()
    frames = getattr(plan, "num_frames", 1)
    rows, tokens, count = plan.batch // frames, plan.num_tokens * frames, plan.num_slots
    assert plan.slot.shape == (rows, tokens) and plan.slot.dtype == torch.int64
    assert plan.size.shape == (rows, count)
    assert plan.representative.shape == (rows, count)
    assert plan.representative.dtype == torch.int64
    assert plan.slot.min() >= 0 and plan.slot.max() < count
    assert plan.representative.min() >= 0 and plan.representative.max() < tokens
    total = plan.size.sum(1).double()
    torch.testing.assert_close(total, torch.full((rows,), tokens).double(), rtol=1e-5, atol=0)
    if not is_soft(plan):
        for slot, size in zip(plan.slot, plan.size):
            assert torch.equal(slot.bincount(minlength=count), size)
        own = plan.slot.gather(1, plan.representative)
        assert torch.equal(own, torch.arange(count).expand(rows, -1))


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(make, dtype):
    plan = make()
    frames = getattr(plan, "num_frames", 1)
    rows = plan.batch // frames
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(plan.batch, plan.num_tokens, 4, generator=generator).to(dtype)
    merged = plan.merge(x)
    assert merged.shape == (rows, plan.num_slots, 4) and merged.dtype == dtype
    back = plan.unmerge(merged)
    assert back.shape == x.shape and back.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2}.get(dtype, 1e-4)
    same = x[:1, :1].expand_as(x)
    torch.testing.assert_close(plan.unmerge(plan.merge(same)), same, rtol=tolerance, atol=tolerance)
    if not is_soft(plan):
        # Copies of a slot merge into it again, and unmerging gathers by slot.
        again = plan.merge(back)
        torch.testing.assert_close(again, merged, rtol=tolerance, atol=tolerance)
        index = plan.slot[..., None].expand(-1, -1, 4)
        assert torch.equal(back, merged.gather(1, index).view_as(back))


@every_plan
def test_wrong_shapes_are_named(make):
    plan = make()
    with pytest.raises(ValueError, match="merge expects"):
        plan.merge(torch.zeros(plan.batch, plan.num_tokens + 3, 2))
    with pytest.raises(ValueError, match="unmerge expects"):
        plan.unmerge(torch.zeros(plan.batch, plan.num_slots + 3, 2))


@every_plan
def test_copies(make):
    plan = make()
    x = torch.randn(plan.batch, plan.num_tokens, 2)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(other.merge(x), plan.merge(x))
        assert torch.equal(other.representative, plan.representative)
        assert repr(other) == repr(plan)
