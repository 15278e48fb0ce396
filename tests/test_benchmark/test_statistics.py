# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Ratios of paired rounds, their interval, eta, and what is called noise."""

import random

import pytest

from mmagic_tome.benchmark.report import case_table
from mmagic_tome.benchmark.statistics import coverage, duels, interval, summarise


def results(**seconds):
    return {
        name: dict(
            kind=name,
            seconds=times,
            ideal=None if name == "dense" else "ideal",
            peak_bytes=2**20,
            peak_in="aten::mul",
            relative_rmse_to_dense=0.1,
            config=None,
        )
        for name, times in seconds.items()
    }


def table_of(found, **missing):
    return case_table(dict(results=found, missing=missing, counts=None))


def test_ratios_are_of_each_round():
    # A machine that slows down does not show.
    found = results(
        dense=[10.0, 20.0, 40.0, 10.0, 10.0, 20.0],
        ours=[6.0, 12.0, 24.0, 6.0, 6.0, 12.0],
        ideal=[5.0, 10.0, 20.0, 5.0, 5.0, 10.0],
    )
    rows = {row["contender"]: row for row in summarise(found)}
    assert rows["ours"]["speedup"].median == pytest.approx(10 / 6) and rows["ours"]["clear"]
    assert rows["ours"]["eta"].median == pytest.approx(0.8)
    assert rows["ideal"]["eta"].median == pytest.approx(1)
    assert rows["dense"]["eta"] is None and rows["dense"]["clear"] is None


def test_interval_is_that_of_the_sign_test():
    # Conover's table: 9 values, the 2nd and the 8th, 96.1 %.
    found = interval([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    assert (found.low, found.median, found.high) == (2, 5, 8)
    assert found.coverage == pytest.approx(0.9609, abs=1e-4)
    assert coverage(3, 0) == 0.75
    few = interval([1.0, 2.0, 4.0])
    assert (few.low, few.high, few.coverage) == (1, 4, 0.75)


def test_interval_covers_the_true_median_as_often_as_it_says():
    draw = random.Random(0)
    inside = sum(
        not interval([draw.gauss(1, 0.2) for _ in range(9)]).excludes(1) for _ in range(2000)
    )
    assert inside / 2000 == pytest.approx(0.961, abs=0.015)


def test_a_spread_larger_than_the_effect_is_said():
    noisy = results(dense=[10.0] * 6, ours=[5.0, 20.0, 6.0, 18.0, 9.0, 5.0])
    table = table_of(noisy)
    assert "within noise (ours)" in table and ") within noise |" in table
    clear = table_of(results(dense=[10.0] * 6, ours=[5.0, 5.1, 5.0, 5.1, 5.2, 5.0]))
    assert "noise" not in clear and "1.980 (1.923 - 2.000)" in clear


def test_no_eta_where_the_ideal_gains_nothing():
    found = results(dense=[10.0] * 6, ours=[9.0] * 6, ideal=[9.0, 11.0, 10.0, 9.5, 10.5, 9.0])
    assert all(row["eta"] is None for row in summarise(found))
    assert "not even the ideal" in table_of(found)


def test_few_rounds_are_said_and_so_is_who_did_not_run():
    found = results(dense=[10.0] * 3, ours=[5.0] * 3, tomesd=[6.0] * 3)
    found["ours"]["peak_bytes"] = 2**20 + 2**18
    table = table_of(found, mmagic="TypeError: x")
    assert "3 rounds give 75% certainty at most" in table
    assert "mmagic does not take part: TypeError: x" in table
    assert "ours needs 0.25 MiB more than dense at its peak (+25.00%)" in table
    assert [(duel["ours"], duel["other"], duel["clear"]) for duel in duels(found)] == [
        ("ours", "tomesd", True)
    ]


def test_what_takes_several_steps_is_said():
    found = results(dense=[10.0] * 6, ours=[5.0] * 6, other=[5.0] * 6)
    found["ours"]["config"] = {"ratio": 0.5, "plan_interval": 1, "residual": False}
    found["other"]["config"] = {"ratio": 0.5, "plan_interval": 2, "residual": True}
    found["third"] = dict(found["other"], config={"cache": [{"region": "network"}]})
    assert "\n- other, third: state kept between steps shows in whole runs" in table_of(found)


def test_own_configs_are_compared_with_the_first_and_with_the_others():
    found = results(**{name: [1.0, 2.0, 3.0] for name in ("dense", "ours", "a", "b", "tomesd")})
    for name in ("a", "b"):
        found[name]["kind"] = "ours"
    pairs = [(duel["ours"], duel["other"]) for duel in duels(found)]
    assert pairs == [(name, "tomesd") for name in ("ours", "a", "b")] + [
        ("a", "ours"),
        ("b", "ours"),
    ]
