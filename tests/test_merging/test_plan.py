# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import MergePlan, MlerpPlan, PrunedPlan
from mmagic_tome.merging.plan import entry_indices, flat_rows

PLANS = [MergePlan, MlerpPlan, PrunedPlan]


def random_slots(batch: int, tokens: int, slots: int, seed: int = 0) -> torch.Tensor:
    """Every slot used at least once, the rest anywhere, shuffled per batch entry."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        rest = torch.randint(slots, (tokens - slots,), generator=generator)
        row = torch.cat([torch.arange(slots), rest])
        rows.append(row[torch.randperm(tokens, generator=generator)])
    return torch.stack(rows)


def brute_force_merge(x: torch.Tensor, slot: torch.Tensor, slots: int) -> torch.Tensor:
    out = torch.zeros(x.shape[0], slots, x.shape[2], dtype=torch.float64)
    for b in range(x.shape[0]):
        for s in range(slots):
            out[b, s] = x[b, slot[b] == s].double().mean(0)
    return out


plans = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(0, 10**6)).flatmap(
    lambda t: st.tuples(st.just(t[0]), st.just(t[1]), st.integers(1, t[1]), st.just(t[2]))
)


@settings(deadline=None, max_examples=60)
@given(plans)
def test_merge_is_the_mean_of_each_slot(shape):
    batch, tokens, slots, seed = shape
    slot = random_slots(batch, tokens, slots, seed)
    plan = MergePlan(slot, slots)
    x = torch.randn(batch, tokens, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(plan.merge(x).double(), brute_force_merge(x, slot, slots))


@settings(deadline=None, max_examples=60)
@given(plans)
def test_properties(shape):
    batch, tokens, slots, seed = shape
    slot = random_slots(batch, tokens, slots, seed)
    plan = MergePlan(slot, slots)
    assert (plan.batch, plan.num_tokens, plan.num_slots) == (batch, tokens, slots)
    assert torch.equal(plan.size.sum(1), torch.full((batch,), tokens))
    assert int(plan.size.min()) >= 1
    y = torch.randn(batch, slots, 3)
    # Unmerging copies, so merging what was unmerged gives it back.
    torch.testing.assert_close(plan.merge(plan.unmerge(y)), y)
    # The sum over tokens survives merging when slots are weighted by their sizes.
    x = torch.randn(batch, tokens, 3)
    weighted = (plan.merge(x) * plan.size[..., None]).sum(1)
    torch.testing.assert_close(weighted, x.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plan.merge(x, "sum").sum(1), x.sum(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(plan.merge(x, "max").amax(1), x.amax(1))


def test_unmerge_gathers_by_slot():
    slot = torch.tensor([[0, 1, 0, 2], [2, 1, 1, 0]])
    y = torch.arange(6.0).view(2, 3, 1)
    expected = torch.tensor([[0.0, 1, 0, 2], [5, 4, 4, 3]])[..., None]
    assert torch.equal(MergePlan(slot, 3).unmerge(y), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    slot = random_slots(2, 64, 24)
    plan = MergePlan(slot, 24)
    x = torch.randn(2, 64, 16).to(dtype)
    merged = plan.merge(x)
    assert merged.dtype == dtype and plan.unmerge(merged).dtype == dtype
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    expected = brute_force_merge(x, slot, 24)
    torch.testing.assert_close(merged.double(), expected, rtol=tolerance, atol=tolerance)


def test_non_contiguous_input():
    plan = MergePlan(random_slots(2, 12, 5), 5)
    x = torch.randn(2, 7, 12).transpose(1, 2)
    torch.testing.assert_close(plan.merge(x), plan.merge(x.contiguous()))
    y = torch.randn(2, 7, 5).transpose(1, 2)
    assert torch.equal(plan.unmerge(y), plan.unmerge(y.contiguous()))


def test_gradients_flow_through_merge_and_unmerge():
    plan = MergePlan(random_slots(2, 9, 4), 4)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: plan.unmerge(plan.merge(t).sin()), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_training_step_has_finite_gradients(dtype):
    plan = MergePlan(random_slots(2, 9, 4), 4)
    x = torch.randn(2, 9, 3).to(dtype).requires_grad_()
    plan.unmerge(plan.merge(x)).float().square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_pickles():
    plan = MergePlan(random_slots(1, 6, 3), 3)
    x = torch.randn(1, 6, 2)
    assert torch.equal(pickle.loads(pickle.dumps(plan)).merge(x), plan.merge(x))


def test_representatives_in_any_order_of_the_slots():
    slot = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]])
    for make in PLANS:
        assert make(slot, 3).representative.tolist() == [[0, 1, 3], [3, 2, 0]]  # the first of each
        per_entry = make(slot, 3, torch.tensor([[2], [1]]))
        assert per_entry.representative.tolist() == [[2, 1, 3], [3, 2, 1]]
        shared = make(slot, 3, torch.tensor([3, 1]))
        assert shared.representative.tolist() == [[0, 1, 3], [3, 2, 1]]


@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize(
    ("slot", "slots"),
    [
        (torch.zeros(4, dtype=torch.int64), 1),
        (torch.zeros(1, 4), 1),
        (torch.zeros(1, 4, dtype=torch.int64), 0),
        (torch.zeros(1, 4, dtype=torch.int64), 5),
    ],
)
def test_bad_plans(make, slot, slots):
    with pytest.raises(ValueError, match="must be"):
        make(slot, slots)


def test_bad_shapes():
    plan = MergePlan(random_slots(2, 6, 3), 3)
    with pytest.raises(ValueError, match=r"merge expects \(2, 6, C\)"):
        plan.merge(torch.zeros(4, 6, 2))
    with pytest.raises(ValueError, match=r"unmerge expects \(2, 3, C\)"):
        plan.unmerge(torch.zeros(2, 6, 2))
    with pytest.raises(ValueError, match="mode"):
        plan.merge(torch.zeros(2, 6, 2), "median")


@pytest.mark.parametrize("make", PLANS)
def test_what_a_plan_keeps_is_small_and_survives_pickling(make):
    """Plans of all blocks may be kept for several steps: no 64-bit copy of the slots."""
    slot = random_slots(2, 64, 32, 0)
    plan = make(slot, 32)
    names = {name for kind in type(plan).__mro__ for name in getattr(kind, "__slots__", ())}
    held = [getattr(plan, name, None) for name in names]
    held = [one for one in held if isinstance(one, torch.Tensor)]
    assert sum(one.numel() * one.element_size() for one in held) <= 2 * (64 + 64 + 32) * 4
    again = pickle.loads(pickle.dumps(plan))
    x = torch.randn(2, 64, 3)
    assert torch.equal(again.merge(x), plan.merge(x))
    for one in (plan, again):
        assert torch.equal(one.slot, slot) and one.slot.dtype == one.size.dtype == torch.int64
        assert torch.equal(one.slot.gather(1, one.representative), torch.arange(32).expand(2, -1))


@pytest.mark.parametrize("make", PLANS)
def test_an_empty_batch(make):
    plan = make(torch.zeros(0, 8, dtype=torch.int64), 4)
    assert plan.slot.shape == (0, 8) and plan.size.shape == (0, 4)
    assert plan.unmerge(torch.zeros(0, 4, 3)).shape == (0, 8, 3)


def test_rows_that_32_bits_cannot_count():
    index = torch.tensor([[0, 5], [1, 2]])
    assert flat_rows(index, 10).dtype == torch.int32
    assert flat_rows(index, 10).tolist() == [0, 5, 11, 12]
    large = flat_rows(index, 2**30)
    assert torch.equal(entry_indices(large, (2, 2), 2**30), index)
    assert large.dtype == torch.int64 and large.tolist() == [0, 5, 2**30 + 1, 2**30 + 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_tokens_are_summed_in_single_precision(dtype):
    slot = torch.zeros(1, 4096, dtype=torch.int64)
    slot[0, 0] = 1
    y = torch.ones(1, 2, 1, dtype=dtype, requires_grad=True)
    MergePlan(slot, 2).unmerge(y).sum().backward()
    # One by one in half precision the sum would stay at 256 or 2048.
    assert y.grad.flatten().tolist() == [torch.tensor(4095.0).to(dtype).item(), 1]
