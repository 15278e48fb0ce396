# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagic_tome.merging import grid_layout, random_layout, regular_layout
from mmagic_tome.merging.random import hashed_integers, step_key

sizes = st.tuples(st.integers(1, 33), st.integers(1, 33), st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None, max_examples=80)
@given(sizes, st.integers(0, 2**40), st.integers(1, 3))
def test_every_complete_cell_has_one_destination(size, seed, count):
    h, w, sx, sy = size
    layout = random_layout(h, w, sx, sy, seed=seed, count=count)
    cells = (h // sy) * (w // sx)
    assert layout.destinations.shape == (count, cells)
    assert layout.sources.shape == (count, h * w - cells)
    for index in range(count):
        destinations, sources = layout.select(index)
        together = torch.cat([destinations, sources]).sort().values
        assert torch.equal(together, torch.arange(h * w))
        row, column = destinations // w, destinations % w
        cell = (row // sy) * (w // sx) + column // sx
        assert torch.equal(cell, torch.arange(cells))


def test_regular_layout_takes_the_top_left_corner():
    destinations, sources = regular_layout(3, 5, sx=2, sy=2).select(0)
    assert destinations.tolist() == [0, 2]
    assert sorted(sources.tolist()) == [1, 3, 4, *range(5, 15)]


def test_cells_of_more_tokens_than_a_byte_counts():
    offset = torch.tensor([[0, 255, 256, 399]])
    layout = grid_layout(offset, 40, 40, 20, 20)
    corners = torch.tensor([0, 20, 20 * 40, 20 * 40 + 20])
    inside = offset[0] // 20 * 40 + offset[0] % 20
    destinations, sources = layout.select(0)
    assert torch.equal(destinations, corners + inside)
    assert torch.equal(torch.cat([destinations, sources]).sort().values, torch.arange(1600))
    assert grid_layout(offset[:, :1], 2, 2, 2, 2).offset.dtype == torch.uint8


def test_grid_smaller_than_a_cell_has_no_destination():
    layout = regular_layout(1, 7, sx=2, sy=2)
    assert layout.destinations.shape == (1, 0) and layout.sources.shape == (1, 7)


def test_random_layouts_depend_on_seed_step_and_site_only():
    def draw(seed=0, step=3.0, count=2):
        key = step_key(torch.tensor(step))
        return random_layout(16, 16, seed=seed, step=key, count=count).destinations

    state = torch.random.get_rng_state()
    first = draw()
    torch.randn(5)
    assert torch.equal(first, draw())
    torch.random.set_rng_state(state)
    draw()
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, draw(seed=1))
    assert not torch.equal(first, draw(seed=1 << 40))
    assert not torch.equal(first, draw(step=4.0))
    assert torch.equal(first, draw(count=5)[:2])


def test_step_key_is_the_same_for_integers_and_floats():
    assert step_key(torch.tensor(981)) == step_key(torch.tensor(981.0, dtype=torch.float64))
    assert step_key(torch.tensor(0.5)) != step_key(torch.tensor(0.25))


@pytest.mark.parametrize("upper", [4, 6, 9])
def test_hashed_integers_are_uniform_and_independent(upper):
    numbers = hashed_integers(upper, 7, step_key(torch.tensor(20)), 8, 20000, torch.device("cpu"))
    assert int(numbers.min()) == 0 and int(numbers.max()) == upper - 1
    expected = numbers.numel() / upper
    chi2 = ((numbers.flatten().bincount(minlength=upper) - expected) ** 2 / expected).sum()
    assert chi2 < 30  # 0.99999 quantile for 8 degrees of freedom is 37
    # Rows, neighbours and steps are uncorrelated.
    values = numbers.double() - numbers.double().mean()
    correlation = torch.corrcoef(values) - torch.eye(8)
    assert correlation.abs().max() < 0.04
    neighbours = torch.corrcoef(torch.stack([values[0, :-1], values[0, 1:]]))[0, 1]
    assert abs(neighbours) < 0.04
    other = hashed_integers(upper, 7, step_key(torch.tensor(21)), 8, 20000, torch.device("cpu"))
    assert abs((numbers == other).double().mean() - 1 / upper) < 0.01
