# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import json
import pickle

import numpy as np
import pytest

from mmagic_tome import ToMeError
from mmagic_tome.validate import (
    check_bool,
    check_choice,
    check_integer,
    check_keys,
    check_number,
    check_range,
    frozen,
    nearest,
    plain,
)

INFINITE = 10**400  # too large for a float
PAIR, WORDS = ((0.25, 1),), (["mean", "max"],)


@pytest.mark.parametrize(
    ("check", "options", "values", "end"),
    [
        (check_bool, (), (1, "yes"), "must be True or False; write key=True"),
        (check_bool, (), (0, None), "must be True or False; write key=False"),
        (check_integer, (1, 5), (0, True, "3", INFINITE), "an integer in [1, 5]; write key=1"),
        (check_integer, (1, 5), (9,), "must be an integer in [1, 5]; write key=5"),
        (check_integer, (1, 5), (2.6,), "must be an integer in [1, 5]; write key=3"),
        (check_integer, (1, None, 2), ("3",), "at least 1; write key=2"),
        (check_number, (0, 1), (-1, float("nan"), float("inf"), True, "1"), "1; write key=0"),
        (check_number, (0, 1), (2,), "must be a number at least 0 and at most 1; write key=1"),
        (check_number, (0, 1), (1j, None, INFINITE), "and at most 1; write key=0"),
        (check_number, (0, float("inf"), 2), ("x",), "must be a number at least 0; write key=2"),
        (check_number, (0, 1, 0.5, True), (0,), "above 0 and at most 1; write key=0.5"),
        (check_range, PAIR, ((0.5, 0.25),), "write key=(0.25, 0.5)"),
        (check_range, PAIR, ((0.5, 0.5), (0, 2), (0.5,), 0.5, "01"), "write key=(0.25, 1)"),
        (check_range, PAIR, (None, (0, True), (0, 0.5, 1)), "write key=(0.25, 1)"),
        (check_choice, WORDS, ("maxx",), "must be one of mean, max; write key='max'"),
        (check_choice, WORDS, (3,), "one of mean, max; write key='mean'"),
    ],
)
def test_what_is_wrong_and_what_to_write(check, options, values, end):
    for value in values:
        with pytest.raises(ToMeError) as error:
            check("here: ", "key", value, *options)
        message = str(error.value)
        assert message.startswith(f"here: key={value!r} must be") and message.endswith(end)


def test_what_is_right():
    for value in (3, np.int64(3)):
        assert check_integer("", "key", value, 1, 5) == 3
        assert type(check_integer("", "key", value, 1)) is int
    assert check_number("", "key", np.float32(0.5), 0, 1) == 0.5
    assert check_range("", "key", (np.float64(0.25), 1), (0, 1)) == (0.25, 1.0)
    assert check_choice("", "key", "mean", ["mean", "max"]) == "mean"


def test_keys():
    check_keys("ratio", dict(base=1), ["base", "depth"])
    with pytest.raises(ToMeError, match=r"^ratio has no option 'dpth': did you mean 'depth'\?"):
        check_keys("ratio", ["base", "dpth"], ["base", "depth"])
    with pytest.raises(ToMeError, match=r"'xyz': Known: base, depth$"):
        check_keys("ratio", ["xyz"], iter(["base", "depth"]))
    with pytest.raises(ToMeError, match=r"has no option 'old': write new$"):
        check_keys("ratio", ["old"], ["base"], {"old": "write new"})
    assert nearest("sites", ["ratio"]) is None


def test_frozen_and_plain():
    given = {"a": [1, {"2": np.float32(0.5)}], 3: np.int64(4), "b": np.bool_(True), "c": True}
    one = frozen(given)
    assert one["a"] == (1, {2: 0.5}), "levels are strings in JSON"
    assert hash(one) == hash(frozen(given))
    assert type(one[3]) is int and one["c"] is True
    for change in ("pop", "setdefault", "__delitem__"):
        with pytest.raises(TypeError, match="immutable"):
            getattr(one, change)("a")
    assert pickle.loads(pickle.dumps(one)) == one
    assert plain(one)["a"] == [1, {2: 0.5}]
    json.dumps(plain({**one, "b": True}))
