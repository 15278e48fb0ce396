# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The order of interleaved rounds."""

import gc
from collections import Counter

import pytest

from mmagic_tome.lab.measure import balanced_order, interleaved


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("first", [0, 1])
def test_every_method_runs_after_every_other_equally_often(count, first):
    names = [f"method {number}" for number in range(count)]
    rounds = count * (1 + count % 2)
    neighbours, places = Counter(), Counter()
    for turn in range(first, first + rounds):
        order = balanced_order(names, turn)
        assert sorted(order) == names
        neighbours.update(zip(order, order[1:]))
        places.update(enumerate(order))
    assert set(neighbours) == {(a, b) for a in names for b in names if a != b}
    assert set(neighbours.values()) <= {1 + count % 2}
    assert set(places.values()) == {1 + count % 2}


def test_rounds_go_on_and_report_progress():
    ran, seen = [], []
    calls = {name: (lambda name=name: ran.append(name) or len(ran)) for name in "abc"}
    found = list(interleaved(calls, range(4, 6), progress=lambda turn, name: seen.append(name)))
    assert ran == seen == balanced_order("abc", 4) + balanced_order("abc", 5)
    assert found == [(4 + n // 3, name, n + 1) for n, name in enumerate(ran)]


def test_garbage_is_collected_before_a_call_and_old_objects_are_left_out():
    class Node:
        alive = 0

        def __init__(self):
            self.me = self  # only the collector frees it
            Node.alive += 1

        def __del__(self):
            Node.alive -= 1

    gc.unfreeze()
    alive = []
    for _ in interleaved({"a": lambda: alive.append(Node.alive) or (Node() and None)}, range(3)):
        assert gc.get_freeze_count() > 0
    assert alive == [0, 0, 0] and gc.get_freeze_count() == 0
    gc.freeze()
    list(interleaved({"a": int}, range(1)))
    assert gc.get_freeze_count() > 0
