# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import json
import pickle

import numpy as np
import pytest

from mmagic_tome import ToMeError
from mmagic_tome.validate import (
    FrozenDict,
    check_bool,
    check_choice,
    check_integer,
    check_keys,
    check_number,
    check_range,
    frozen,
    is_number,
    nearest,
    plain,
)


def said(check, *args, **options):
    with pytest.raises(ToMeError) as error:
        check("here: ", "key", *args, **options)
    message = str(error.value)
    assert message.startswith("here: key=")
    return message


def test_booleans():
    assert check_bool("", "key", True) is True
    for value, instead in ((1, True), (0, False), ("yes", True), (None, False)):
        assert said(check_bool, value).endswith(f"must be True or False; write key={instead}")


def test_integers():
    for value in (3, np.int64(3)):
        assert check_integer("", "key", value, 1, 5) == 3
        assert type(check_integer("", "key", value, 1)) is int
    for value, instead in ((0, 1), (9, 5), (2.6, 3), (True, 1), ("3", 1), (10**400, 1)):
        message = said(check_integer, value, 1, 5)
        assert message.endswith(f"must be an integer in [1, 5]; write key={instead}"), message
    assert said(check_integer, "3", 1, default=2).endswith("at least 1; write key=2")


def test_numbers():
    assert check_number("", "key", 1, 0, 1) == 1
    assert check_number("", "key", np.float32(0.5), 0, 1) == 0.5
    cases = ((-1, 0), (2, 1), (float("nan"), 0), (float("inf"), 0), (True, 0), ("1", 0))
    for value, instead in cases:
        message = said(check_number, value, 0, 1)
        assert message.endswith(f"at least 0 and at most 1; write key={instead}"), message
    assert said(check_number, "x", 0, float("inf"), default=2).endswith("at least 0; write key=2")
    message = said(check_number, 0, 0, 1, default=0.5, open_low=True)
    assert message.endswith("above 0 and at most 1; write key=0.5")


def test_ranges():
    assert check_range("", "key", [0, 1], (0, 1)) == (0.0, 1.0)
    assert check_range("", "key", (np.float64(0.25), 0.5), (0, 1)) == (0.25, 0.5)
    assert said(check_range, (0.5, 0.25), (0, 1)).endswith("write key=(0.25, 0.5)")
    for value in ((0.5, 0.5), (0, 2), (0.5,), 0.5, "01", None, (0, True), (0, 0.5, 1)):
        assert said(check_range, value, (0.25, 1)).endswith("write key=(0.25, 1)")


def test_choices():
    assert check_choice("", "key", "mean", ["mean", "max"]) == "mean"
    assert said(check_choice, "maxx", ["mean", "max"]).endswith("write key='max'")
    assert said(check_choice, 3, ["mean", "max"]).endswith("one of mean, max; write key='mean'")
    assert said(check_choice, "?", ["mean", "max"], "max").endswith("write key='max'")


def test_keys():
    check_keys("ratio", dict(base=1), ["base", "depth"])
    with pytest.raises(ToMeError, match=r"^ratio has no option 'dpth': did you mean 'depth'\?"):
        check_keys("ratio", ["base", "dpth"], ["base", "depth"])
    with pytest.raises(ToMeError, match=r"'xyz': Known: base, depth$"):
        check_keys("ratio", ["xyz"], iter(["base", "depth"]))
    with pytest.raises(ToMeError, match=r"has no option 'old': write new$"):
        check_keys("ratio", ["old"], ["base"], {"old": "write new"})
    assert nearest("sites", ["ratio"]) is None


def test_what_a_number_is():
    for value in (0, 1.5, np.float32(1), np.int8(1), 10**300):
        assert is_number(value)
    for value in (True, "1", None, float("nan"), float("-inf"), 10**400, 1j, [1]):
        assert not is_number(value)


def test_frozen_and_plain():
    given = {"a": [1, {"2": np.float32(0.5)}], 3: np.int64(4), "b": np.bool_(True), "c": True}
    one = frozen(given)
    assert one["a"] == (1, {2: 0.5}), "levels are strings in JSON"
    assert hash(one) == hash(frozen(given)) and isinstance(one["a"][1], FrozenDict)
    assert type(one[3]) is int and one["c"] is True
    for name, *args in (
        ("update", {"a": 1}),
        ("pop", "a"),
        ("__setitem__", "a", 1),
        ("__delitem__", "a"),
        ("setdefault", "z", 1),
        ("clear",),
        ("__ior__", {"a": 1}),
    ):
        with pytest.raises(TypeError, match="immutable"):
            getattr(one, name)(*args)
    assert pickle.loads(pickle.dumps(one)) == one
    assert plain(one)["a"] == [1, {2: 0.5}]
    json.dumps(plain({**one, "b": True}))
