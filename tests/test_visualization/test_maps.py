# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merge maps, error maps, sheets and the cost plot, on pictures made by hand."""

import drawings
import numpy as np
import pytest
import torch
from PIL import Image

from mmagic_tome import ToMeError
from mmagic_tome.merging import MergePlan
from mmagic_tome.visualization.cost_plot import cost_plot, cost_rows, short_name
from mmagic_tome.visualization.error_map import error_map, pixel_error
from mmagic_tome.visualization.merge_map import merge_map
from mmagic_tome.visualization.recorder import Record
from mmagic_tome.visualization.sheets import (
    _counts,
    grid_sheet,
    merge_sheet,
    save_gif,
    spread_steps,
    step_frames,
)


def picture(values):
    return Image.fromarray(np.asarray(values, np.uint8)[..., None].repeat(3, -1))


def noise(size=16, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (size, size, 3))
    return Image.fromarray(values.astype(np.uint8))


def test_groups_are_painted_in_their_mean_colour():
    # Four tokens of one pixel: the first and the last become one.
    plan = MergePlan(torch.tensor([[0, 1, 2, 0]]), 3)
    painted = np.asarray(merge_map(plan.slot[0], (2, 2), picture([[0, 50], [90, 200]]), edge=None))
    factor = painted.shape[0] // 2
    assert factor == 6 and painted.shape == (12, 12, 3)
    tokens = painted[::factor, ::factor, 0]
    # What is alone shows the picture.
    assert tokens.tolist() == [[100, 50], [90, 100]]


def test_edges_run_between_groups_and_not_inside():
    slot = np.array([0, 0, 1, 2])
    red = (255, 0, 0)
    painted = np.asarray(merge_map(slot, (2, 2), picture(np.zeros((12, 12))), edge=red))
    edge = (painted == red).all(-1)
    # Under the merged row, nothing within it, nothing between the two tokens that are alone.
    assert edge[5].all() and edge.sum() == 12


@pytest.mark.parametrize(("colour", "line"), [(0, 255), (255, 150)])
def test_lines_are_seen_on_dark_and_on_bright_colours(colour, line):
    slot = np.array([0, 0, 1, 2])
    painted = np.asarray(merge_map(slot, (2, 2), picture(np.full((12, 12), colour))))
    assert (painted[5] == line).all() and (painted[4] == colour).all()


def test_a_merge_map_is_the_picture_where_nothing_is_merged():
    image = noise(12)
    assert np.array_equal(np.asarray(merge_map(np.arange(4), (2, 2), image)), np.asarray(image))


def test_grids_need_not_divide_the_picture():
    image = noise(17)
    painted = merge_map(np.zeros(6, int), (2, 3), image, edge=None)
    mean = np.asarray(image, float).mean((0, 1)).round()
    assert painted.size == (34, 34) or painted.size == (17, 17)
    assert np.array_equal(np.asarray(painted)[3, 3], mean)


@pytest.mark.parametrize(
    ("slot", "grid", "said"),
    [([0, 0, 1], (2, 2), "do not fit a grid"), ([0] * 900, (30, 30), "smaller than its grid")],
)
def test_what_does_not_fit_is_said(slot, grid, said):
    with pytest.raises(ToMeError, match=said):
        merge_map(np.array(slot), grid, noise())


def test_error_map_is_grey_where_pictures_agree():
    dense, merged = noise(), np.asarray(noise()).copy()
    merged[3, 5] = 255 - merged[3, 5]
    heat = np.asarray(error_map(dense, Image.fromarray(merged))).astype(int)
    coloured = (heat.max(-1) - heat.min(-1)) > 0
    assert np.argwhere(coloured).tolist() == [[3, 5]]
    error = pixel_error(dense, Image.fromarray(merged))
    expected = np.abs(255 - 2 * np.asarray(dense)[3, 5].astype(int)).mean()
    assert error.sum() == pytest.approx(expected)
    with pytest.raises(ToMeError, match="cannot be compared"):
        error_map(dense, noise(8))


def records(steps=5, blocks=("down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.x.0")):
    slot = np.array([[0, 1, 2, 3], [0, 1, 1, 2]], np.int32)
    return [Record(step, block, (2, 2), slot) for step in range(steps) for block in blocks]


def test_sheet_shows_the_first_and_the_last_step(tmp_path):
    assert spread_steps(records(), 3) == [0, 2, 4] and spread_steps(records(2), 3) == [0, 1]
    assert records()[0].kept == 4
    sheet = merge_sheet("title", records(), noise(64), 3)
    assert sheet.width > 3 * 64 and sheet.height > 2 * 64
    frames = step_frames("title", records(), noise(64))
    assert len(frames) == 5 and len({frame.size for frame in frames}) == 1
    save_gif(tmp_path / "a.gif", [noise(32, seed) for seed in range(3)])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0


def test_a_sheet_says_how_many_tokens_are_left_where():
    def varying(kept):
        return np.minimum(np.arange(4), kept - 1)[None].astype(np.int32)

    found = [Record(0, "down.0", (2, 2), varying(2)), Record(1, "down.0", (2, 2), varying(3))]
    assert _counts(found, "down.0") == "4 to 2-3" and _counts(found[:1], "down.0") == "4 to 2"


def test_pictures_of_a_sheet_are_whole_with_a_note_and_texts_of_two_lines():
    red = Image.new("RGB", (40, 30), (255, 0, 0))
    for note in ("", "how to read it"):
        sheet = grid_sheet("title", ["a", "b"], [("one\ntwo", [red, red]), ("", [None, red])], note)
        pixels = np.asarray(sheet).astype(int)
        is_red = (pixels == (255, 0, 0)).all(-1)
        assert is_red.sum() == 3 * 40 * 30
        assert not is_red[-1].any() and not is_red[:, -1].any()


def site(name, kind, dense, merged, kept=2):
    times = {"dense": {"ms": dense}, "merged": {"ms": merged}}
    return dict(site=name, kind=kind, tokens=4, kept=kept, **times)


def test_cost_rows_split_a_block(tmp_path, monkeypatch):
    block = "up_blocks.2.attentions.1.transformer_blocks.0"
    sites = [site(f"{block}.attn", "attn", 10.0, 4.0), site(block, "whole block", 15.0, 12.0)]
    (row,) = cost_rows({"sites": sites})
    # 3 of the 6 that the site gained went into making the plan.
    assert (row["dense"], row["merged"], row["matching"]) == (10, 4, 3)
    assert (row["tokens"], row["kept"]) == (4, 2)
    assert short_name(row["name"]) == "up 2.1.0 attn" and short_name(block) == "up 2.1.0"
    figures = drawings.kept_figures(monkeypatch)
    cost_plot(tmp_path / "cost", {"sites": sites}, "title")
    (axes,) = figures[0].axes
    # Dense, merged, and behind that what matching takes.
    bars = [(left, width) for left, _, width, _ in drawings.bars_of(axes)]
    assert bars == [(0, 10), (0, 4), (4, 3)]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["10.0 ms, 4 tokens", "7.0 ms, 2 tokens"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["up 2.1.0 attn"]
    with Image.open(tmp_path / "cost") as image:
        assert image.format == "PNG"
