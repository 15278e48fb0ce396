# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest

from mmagic_tome import ToMeError
from mmagic_tome.vit.schedules import (
    relative_cost,
    removed_for_speedup,
    removed_per_block,
    tokens_per_block,
)


def test_schedules():
    assert removed_per_block(8, 3) == [8, 8, 8]
    assert removed_per_block([5, 0, 2], 5) == [5, 0, 2, 0, 0]
    assert removed_per_block((8, -1), 5) == [16, 12, 8, 4, 0]
    assert removed_per_block((8, 1.0), 5) == [0, 4, 8, 12, 16]
    assert removed_per_block((8, 0), 4) == [8, 8, 8, 8]
    assert removed_per_block((8, -0.5), 5) == [12, 10, 8, 6, 4]
    assert removed_per_block((8, -1), 1) == [8]


@pytest.mark.parametrize("blocks", [2, 12, 24])
@pytest.mark.parametrize("inflect", [-1, -0.3, 0.5, 1])
def test_linear_schedules_remove_as_much_as_constant_ones(blocks, inflect):
    counts = removed_per_block((13, inflect), blocks)
    assert abs(sum(counts) - 13 * blocks) <= 1
    assert counts == sorted(counts, reverse=inflect < 0)
    assert counts[0] == int(13 * (1 - inflect) + 0.5)
    assert counts[-1] == int(13 * (1 + inflect) + 0.5)


@pytest.mark.parametrize(
    "r", [True, "8", None, 1.5, -1, (1, 2, 3), (1,), (1.5, 0), (8, "x"), (8, True), [1, -1], [1.0]]
)
def test_wrong_schedules(r):
    with pytest.raises(ToMeError, match=r"\br\b"):
        removed_per_block(r, 12)


def test_no_block_removes_more_than_half():
    assert tokens_per_block([100, 4, 100], 21, 1) == [(21, 11), (11, 7), (7, 4)]


def test_counted_speedup_is_near_the_measured_one_of_the_paper():
    # ViT-L/16 at r = 7 on a V100: 95 -> 167 images per second.
    dense = relative_cost([(197, 197)] * 24, 1024, 4096)
    merged = relative_cost(tokens_per_block([7] * 24, 197, 1), 1024, 4096)
    assert dense / merged == pytest.approx(167 / 95, rel=0.05)
    assert removed_for_speedup(167 / 95, 24, 197, 1, 1024, 4096) in (7, 8)
    assert removed_for_speedup(1.0, 24, 577, 1, 1024, 4096) == 0
