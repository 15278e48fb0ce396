# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
from collections import OrderedDict

import pytest
import torch
from torch.utils._pytree import tree_flatten

from mmagic_tome.cache.extrapolate import OutputHistory, Placeholder, extrapolate, feed_back


def polynomial(time, degree):
    return torch.tensor([3.0 - time, time**degree - 0.5 * time])


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("time", [-1.0, 0.25, 3.0])
def test_polynomials_of_the_order_are_exact(order, time):
    times = (2.0, 1.5, 0.5)[: order + 1]
    outputs = [polynomial(t, order) for t in times]
    if order == 0:
        expected = outputs[0]
    else:
        expected = polynomial(time, order)
    torch.testing.assert_close(extrapolate(times, outputs, time), expected)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_is_returned_may_be_changed(order):
    outputs = [torch.ones(2) * i for i in range(order + 1)]
    copies = [output.clone() for output in outputs]
    extrapolate(range(order + 1), outputs, 5.0).zero_()
    assert all(torch.equal(a, b) for a, b in zip(outputs, copies))


def test_a_fraction_of_the_error_is_added():
    output = torch.tensor([1.0])
    guesses, truths = [torch.tensor([2.0]), torch.tensor([5.0])], [torch.zeros(1), torch.ones(1)]
    assert feed_back(output, guesses, truths, 0.5).item() == 1 + 0.5 * (0 - 2) + 0.5 * (1 - 5)
    assert feed_back(output, [], [], 0.5) is output


# --- histories ------------------------------------------------------------------------------------


def history(order=1, error_feedback=0.0, times=()):
    one = OutputHistory(order, error_feedback)
    for time in times:
        one.record(time, polynomial(time, 1))
    return one


@pytest.mark.parametrize("order", [0, 1, 2])
def test_one_output_more_than_the_order_is_kept(order):
    one = history(order, times=(5.0, 4.0, 3.0, 2.0, 1.0))
    assert len(one) == len(one.outputs) == order + 1 and one.times[-1] == 1.0


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
        found = one.extrapolate(0.5)
        assert type(found) is type(output)
        leaves, structure = tree_flatten(found)
        expected, same = tree_flatten(output)
        assert structure == same
        for x, y in zip(leaves, expected):
            assert torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y


def test_another_shape_begins_anew():
    one = history(times=(3.0, 2.0))
    one.record(1.0, torch.ones(5))
    assert len(one) == 1
    one.record(0.5, torch.ones(5, dtype=torch.float64))
    assert len(one) == 1


def test_two_outputs_at_one_timestep_count_once():
    one = history(times=(3.0, 2.0))
    one.record(2.0, torch.zeros(2))
    assert one.times == [3.0, 2.0] and one.outputs[-1][0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("order", [0, 1])
def test_error_feedback(order):
    """The truth at a skipped step is on the line between the computed neighbours."""
    one = history(order, error_feedback=0.5)
    for time, value in ((4.0, 1.0), (3.0, 2.0)):
        one.record(time, torch.tensor([value]))
    guess = one.extrapolate(2.0).item()
    assert guess == (2.0 if order == 0 else 3.0)
    found = one.record(1.0, torch.tensor([8.0])).item()
    assert found == pytest.approx(8 + 0.5 * ((2 + 8) / 2 - guess))
    # What was computed is kept, not what was returned; and nothing is added twice.
    assert one.outputs[-1][0].item() == 8.0
    assert one.record(0.0, torch.tensor([9.0])).item() == 9.0


def test_error_feedback_of_several_skipped_steps():
    one = history(1, error_feedback=1.0)
    for time, value in ((5.0, 0.0), (4.0, 1.0)):
        one.record(time, torch.tensor([value]))
    guesses = [one.extrapolate(time).item() for time in (3.0, 2.0)]
    assert guesses == [2.0, 3.0]
    # On the line from 1 at 4 to 10 at 1: 4 and 7.
    assert one.record(1.0, torch.tensor([10.0])).item() == pytest.approx(10 + (4 - 2) + (7 - 3))


def test_without_feedback_no_guesses_are_kept():
    one = history(times=(3.0, 2.0))
    one.extrapolate(1.0)
    assert not one.guesses


def test_placeholders_have_shapes_and_no_memory():
    output = (torch.ones(2, 3, dtype=torch.float16), [torch.zeros(4)], None)
    placeholder = Placeholder(output)
    for tensor in (placeholder._shapes[0], placeholder._shapes[1][0]):
        assert tensor.untyped_storage().nbytes() <= 4
    made = placeholder.make()
    assert made[0].shape == (2, 3) and made[0].dtype == torch.float16 and made[2] is None
    made[1][0].fill_(1)
    assert placeholder.make()[1][0].shape == (4,)
