# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import grid_layout, random_layout
from mmagic_tome.merging.random import hashed_integers, step_key

CPU = torch.device("cpu")
SIDES, CELLS = st.integers(1, 33), st.integers(1, 4)


@settings(deadline=None, max_examples=80)
@given(SIDES, SIDES, CELLS, CELLS, st.integers(0, 2**40), st.integers(1, 3))
def test_every_complete_cell_has_one_destination(h, w, sx, sy, seed, count):
    layout = random_layout(h, w, sx, sy, seed=seed, count=count)
    cells = (h // sy) * (w // sx)
    for index in range(count):
        destinations, sources = layout.select(index)
        together = torch.cat([destinations, sources]).sort().values
        assert torch.equal(together, torch.arange(h * w))
        cell = (destinations // w // sy) * (w // sx) + destinations % w // sx
        assert torch.equal(cell, torch.arange(cells))
        for every, one in zip(layout.select(slice(None)), (destinations, sources)):
            assert torch.equal(every[index], one)


def test_cells_of_more_tokens_than_a_byte_counts():
    offset = torch.tensor([[0, 255, 256, 399]])
    destinations, _ = grid_layout(offset, 40, 40, 20, 20).select(0)
    corners = torch.tensor([0, 20, 20 * 40, 20 * 40 + 20])
    assert torch.equal(destinations, corners + offset[0] // 20 * 40 + offset[0] % 20)
    assert grid_layout(offset[:, :1], 2, 2, 2, 2).offset.dtype == torch.uint8


def test_random_layouts_depend_on_seed_step_and_block_only():
    def draw(seed=0, step=3.0, count=2):
        key = step_key(torch.tensor(step))
        return random_layout(16, 16, seed=seed, step=key, count=count).select(slice(None))[0]

    state = torch.random.get_rng_state()
    first = draw()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.randn(5)
    assert torch.equal(first, draw()) and torch.equal(first, draw(count=5)[:2])
    assert not torch.equal(first[0], first[1])
    for other in (dict(seed=1), dict(seed=1 << 40), dict(step=4.0)):
        assert not torch.equal(first, draw(**other))
    assert step_key(torch.tensor(981)) == step_key(torch.tensor(981.0, dtype=torch.float64))
    assert step_key(torch.tensor(0.5)) != step_key(torch.tensor(0.25))


@pytest.mark.parametrize("upper", [4, 6, 9])
def test_hashed_integers_are_uniform_and_independent(upper):
    numbers = hashed_integers(upper, 7, step_key(torch.tensor(20)), 8, 20000, CPU)
    assert int(numbers.min()) == 0 and int(numbers.max()) == upper - 1
    expected = numbers.numel() / upper
    chi2 = ((numbers.flatten().bincount(minlength=upper) - expected) ** 2 / expected).sum()
    assert chi2 < 30  # 0.99999 quantile for 8 degrees of freedom is 37
    # Rows, neighbours and steps are uncorrelated.
    correlation = torch.corrcoef(numbers.double()) - torch.eye(8)
    assert correlation.abs().max() < 0.04
    neighbours = torch.corrcoef(torch.stack([numbers[0, :-1], numbers[0, 1:]]).double())[0, 1]
    assert abs(neighbours) < 0.04
    other = hashed_integers(upper, 7, step_key(torch.tensor(21)), 8, 20000, CPU)
    assert abs((numbers == other).double().mean() - 1 / upper) < 0.01
