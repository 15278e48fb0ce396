# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Plots: what is drawn is what was given, labels cover nothing, sheets are exact."""

import math

import numpy as np
import pytest
from PIL import Image

from mmagic_tome.lab import plots
from mmagic_tome.lab.plots import Point


def test_the_front_has_every_point_that_no_other_dominates():
    rng = np.random.default_rng(0)
    points = [Point(str(i), "merging", *rng.integers(0, 20, 2).tolist()) for i in range(60)]
    for sign, higher in ((1, True), (-1, False)):
        front = plots.pareto_front(points, higher)
        for point in points:
            dominated = any(
                other.x >= point.x
                and sign * other.y >= sign * point.y
                and (other.x, other.y) != (point.x, point.y)
                for other in points
            )
            assert ((point.x, point.y) in [(one.x, one.y) for one in front]) == (not dominated)
        assert [point.x for point in front] == sorted({point.x for point in front})


def crowd():
    """A heap of methods around one place, and some alone."""
    heap = [Point(f"method {i}", "merging", 1 + 0.02 * i, 33 + 0.3 * (i % 4)) for i in range(10)]
    alone = [
        Point("13 steps", "fewer steps", 1.5, 45.0, 1.4, 1.6),
        Point("fast", "caching", 2.3, 50.0, 2.0, 2.4),
        Point("DeepCache 5", "DeepCache", 3.2, 28.0, 3.0, 3.3, label=""),
        Point("same images", "caching", 1.2, math.inf),
    ]
    return heap + alone


def test_points_are_labelled_and_an_infinite_one_is_at_the_edge():
    figure = plots.fidelity({"title": crowd()}, "PSNR (dB)")
    axes = figure.axes[0]
    texts = [one.get_text() for one in axes.texts]
    assert "13 steps" in texts and "DeepCache 5" not in texts
    marks = {(x, y) for line in axes.lines for x, y in zip(*line.get_data())}
    assert (1.2, axes.get_ylim()[1]) in marks and "same images, identical" in texts


@pytest.mark.parametrize("higher", [True, False])
def test_better_is_up_and_the_dominated_part_is_shaded(higher):
    points = [Point("a", "caching", 1.5, 2.0), Point("b", "merging", 1.2, 3.0 if higher else 1.0)]
    figure = plots.fidelity({"": points}, "metric", higher)
    axes = figure.axes[0]
    assert axes.yaxis_inverted() == (not higher)
    (shade,) = axes.collections[-1:]
    path = shade.get_paths()[0]
    assert path.contains_point((1.1, 1.95 if higher else 2.05))  # slower than a and worse
    assert not path.contains_point((1.4, 2.5 if higher else 1.5))  # faster than b, better than a


def test_images_of_a_sheet_are_exact_and_captions_fit():
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 255, (4, 20, 30, 3), np.uint8)
    images = [Image.fromarray(array) for array in arrays]
    caption = "a very long prompt with $dollars$ " * 20
    rows = [("first", images[:2]), (caption, images[2:])]
    sheet = np.asarray(plots.contact_sheet("title", ["baseline", "fast"], rows))
    factor = 9  # 30 pixels become at least 256
    large = arrays.repeat(factor, 1).repeat(factor, 2)
    top = plots.MARGIN + 2 * plots.LINE
    step = large.shape[1] + plots.LINE + plots.MARGIN
    for number, image in enumerate(large):
        x = plots.MARGIN + (number % 2) * (image.shape[1] + plots.MARGIN)
        y = top + (number // 2) * step
        assert np.array_equal(sheet[y : y + image.shape[0], x : x + image.shape[1]], image)
    margin = sheet[:, -plots.MARGIN :]
    assert (margin == 255).all()  # no caption runs out of the sheet


def test_a_difference_is_black_where_there_is_none():
    base = Image.new("RGB", (4, 2), (100, 100, 100))
    other = base.copy()
    other.putpixel((1, 0), (100, 100, 100 + 3 * plots.FULL_SCALE // 2))
    other.putpixel((3, 1), (255, 255, 255))
    found = np.asarray(plots.difference_map(base, other)).astype(int)
    assert (found[0, 0] <= 5).all() and found[1, 3].sum() > found[0, 1].sum() > found[0, 0].sum()
