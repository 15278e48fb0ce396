# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The one way to check what a user wrote: every error says what was found and what to write.

``where`` in all functions is what a message begins with, such as ``"method 'toma': "``.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .errors import ToMeError


def fail(where: str, key: str, value: Any, allowed: str, instead: Any) -> NoReturn:
    """Raise :class:`ToMeError`: the key, the value, what is allowed and what to write instead."""
    raise ToMeError(f"{where}{key}={value!r} must be {allowed}; write {key}={instead!r}")


def check_bool(where: str, key: str, value: Any) -> bool:
    """Return ``value`` if it is True or False.

    Raises:
        ToMeError: anything else.
    """
    if not isinstance(value, bool):
        instead = bool(value) if isinstance(value, (int, float, str)) else False
        fail(where, key, value, "True or False", instead)
    return value


def check_integer(
    where: str, key: str, value: Any, low: int, high: int | None = None, default: int | None = None
) -> int:
    """Return ``value`` as an int in [low, high].

    Args:
        high: None for no upper bound.
        default: what to suggest for a value that is no number. Default: ``low``.

    Raises:
        ToMeError: anything else; numpy integers are integers, booleans are not.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        instead = low if default is None else default
        if is_number(value):
            instead = max(round(value), low)
            instead = instead if high is None else min(instead, high)
        fail(where, key, value, f"an integer {allowed}", instead)
    return int(value)


def check_number(
    where: str,
    key: str,
    value: Any,
    low: float,
    high: float,
    default: float | None = None,
    open_low: bool = False,
) -> float:
    """Return ``value``, a finite number in [low, high]; ``high`` may be infinite.

    Args:
        default: what to suggest for a value that is no number. Default: ``low``.
        open_low: exclude ``low`` itself. Default False.

    Raises:
        ToMeError: anything else.
    """
    default = low if default is None else default
    finite = is_number(value)
    if not finite or not low <= value <= high or (open_low and value == low):
        top = "" if math.isinf(high) else f" and at most {high:g}"
        bottom = f"above {low:g}" if open_low else f"at least {low:g}"
        close = min(max(value, low), high) if finite else default
        instead = default if open_low and close == low else close
        raise ToMeError(
            f"{where}{key}={value!r} must be a number {bottom}{top}; write {key}={instead:g}"
        )
    return value if isinstance(value, (int, float)) else float(value)


def check_range(where: str, key: str, value: Any, example: tuple[float, float]) -> tuple:
    """Return ``value`` as a pair (low, high) of numbers with 0 <= low < high <= 1.

    Raises:
        ToMeError: anything else.
    """
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if (
        len(pair) != 2
        or not all(is_number(number) and 0 <= number <= 1 for number in pair)
        or not pair[0] < pair[1]
    ):
        swapped = len(pair) == 2 and all(map(is_number, pair)) and 0 <= pair[1] < pair[0] <= 1
        instead = (pair[1], pair[0]) if swapped else example
        allowed = "(low, high) with 0 <= low < high <= 1, where 1 is the start of a run"
        fail(where, key, value, allowed, instead)
    return float(pair[0]), float(pair[1])


def check_choice(
    where: str, key: str, value: Any, known: Collection[str], default: str | None = None
) -> str:
    """Return ``value`` if it is one of ``known``.

    Args:
        default: what to suggest where no known name is similar. Default: the first.

    Raises:
        ToMeError: anything else.
    """
    if not isinstance(value, str) or value not in known:
        instead = nearest(value, known) or default or next(iter(known))
        fail(where, key, value, f"one of {', '.join(known)}", instead)
    return value


def check_keys(
    what: str,
    spec: Iterable[Any],
    known: Iterable[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raise :class:`ToMeError` for the first key of ``spec`` that is not among ``known``.

    Args:
        what: what has the keys, such as ``"ratio"``.
        elsewhere: keys that are options of something else -> a sentence on what to write.
    """
    known = list(known)
    for key in spec:
        if key in known:
            continue
        if elsewhere and key in elsewhere:
            raise ToMeError(f"{what} has no option {key!r}: {elsewhere[key]}")
        raise ToMeError(
            f"{what} has no option {key!r}: {did_you_mean(key, known)}Known: {', '.join(known)}"
        )


def did_you_mean(wrong: Any, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for a message; empty if no known name is similar."""
    close = nearest(wrong, known)
    return "" if close is None else f"did you mean {close!r}? "


def nearest(wrong: Any, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a wrong one; None if none is."""
    return next(iter(difflib.get_close_matches(str(wrong), list(known), n=1)), None)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite real number; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def plain(value: Any) -> Any:
    """Return ``value`` as JSON would return it: Python numbers for numpy's, lists for tuples."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


class FrozenDict(dict):
    """A dict that cannot be changed, and has a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("options are immutable: use .replace() for a changed copy")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)


def frozen(value: Any) -> Any:
    """Return ``value`` immutable: dicts frozen, tuples for lists, Python numbers for numpy's."""
    if isinstance(value, Mapping):
        return FrozenDict({_key(key): frozen(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(item) for item in value)
    return plain(value)


def _key(key: Any) -> Any:
    # JSON has resolution levels as strings.
    return int(key) if isinstance(key, str) and key.isdecimal() else plain(key)
