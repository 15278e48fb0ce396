# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The order of interleaved rounds."""

from collections import Counter

import pytest

from mmagic_tome.benchmark.rounds import balanced_order


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("first", [0, 1])
def test_everybody_runs_after_every_other_equally_often(count, first):
    names = [f"contender {number}" for number in range(count)]
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
