# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
from collections import OrderedDict

import pytest
import torch
from torch.utils._pytree import tree_flatten

from mmagic_tome.cache.extrapolate import (
    OutputHistory,
    extrapolate,
    placeholder,
    undefined_like,
)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_of_the_order_are_exact(order):
    def polynomial(time):
        return torch.tensor([3.0 - time * (order > 0), time**order - 0.5 * time * (order > 0)])

    times = (2.0, 1.5, 0.5)[: order + 1]
    outputs = [polynomial(time) for time in times]
    for time in (-1.0, 0.25, 3.0):
        found = extrapolate(times, outputs, time)
        torch.testing.assert_close(found, polynomial(time))
        found.zero_()  # it is the caller's
    for output, time in zip(outputs, times):
        assert torch.equal(output, polynomial(time))


# --- histories ------------------------------------------------------------------------------------


def history(order=1, error_feedback=0.0, **values):
    """Of numbers: t4=1.0 is that at timestep 4."""
    one = OutputHistory(order, error_feedback)
    for name, value in values.items():
        one.record(float(name[1:]), torch.tensor([value]))
    return one


@pytest.mark.parametrize("order", [0, 1, 2])
def test_one_output_more_than_the_order_is_kept(order):
    one = history(order, t5=0.0, t4=0.0, t3=0.0, t2=0.0, t1=0.0)
    assert len(one.outputs) == order + 1 and one.times == [3.0, 2.0, 1.0][2 - order :]
    one.extrapolate(0.0)
    assert not one.guesses  # which only error feedback needs


def test_outputs_are_copies():
    one, output = history(order=0), torch.ones(2)
    assert one.record(1.0, output) is output
    output.zero_()
    assert one.extrapolate(0.5).tolist() == [1.0, 1.0]


def test_any_structure_comes_back():
    a, b = torch.ones(2), torch.ones(3, dtype=torch.float64)
    for output in (
        a,
        (a,),
        [a, b],
        (a, None, "kept", 7),
        ([a, b], (b,)),
        OrderedDict(sample=a, mid=(a, b)),
    ):
        one = history(order=0)
        one.record(1.0, output)
        for found in (one.extrapolate(0.5), undefined_like(placeholder(output))):
            assert type(found) is type(output)
            leaves, structure = tree_flatten(found)
            expected, same = tree_flatten(output)
            assert structure == same
            for x, y in zip(leaves, expected):
                if isinstance(y, torch.Tensor):
                    assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
                    x.zero_()  # it is the caller's
                else:
                    assert x == y
        assert torch.equal(tree_flatten(one.extrapolate(0.5))[0][0], a)


def test_another_shape_or_type_begins_anew():
    one = history(t3=0.0, t2=0.0)
    for output in (torch.ones(5), torch.ones(5, dtype=torch.float64)):
        one.record(1.0, output)
        assert len(one.times) == len(one.outputs) == 1


def test_two_outputs_at_one_timestep_count_once():
    one = history(t3=1.0, t2=1.0)
    one.record(2.0, torch.zeros(1))
    assert one.times == [3.0, 2.0] and one.outputs[-1][0].tolist() == [0.0]


def test_placeholders_have_no_memory():
    small = placeholder((torch.ones(2, 3, dtype=torch.float16), [torch.zeros(400)], None))
    assert small[0].untyped_storage().nbytes() <= 4 >= small[1][0].untyped_storage().nbytes()
    assert undefined_like(small)[1][0].is_contiguous()
