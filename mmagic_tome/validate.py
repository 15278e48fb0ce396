# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The one way to check what a user wrote: every error says what was found and what to write.

In all functions ``where`` is the beginning of the message, such as ``"method 'todo': "``, and
``default`` is what to suggest where nothing close to the value is allowed. The ``check_*``
functions return the value, and raise :class:`ToMeError` for a wrong one.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NoReturn, TypeVar

from .errors import ToMeError

T = TypeVar("T", bound="Options")


def fail(where: str, key: str, value: Any, allowed: str, instead: Any) -> NoReturn:
    """Raise :class:`ToMeError`: the key, the value, what is allowed and what to write instead."""
    raise ToMeError(f"{where}{key}={value!r} must be {allowed}; write {key}={instead!r}")


def check_bool(where: str, key: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        instead = bool(value) if isinstance(value, (int, float, str)) else False
        fail(where, key, value, "True or False", instead)
    return value


def check_integer(
    where: str, key: str, value: Any, low: int, high: int | None = None, default: int | None = None
) -> int:
    """An int in [low, high], default no upper bound; numpy integers are, booleans are not.

    ``default`` is ``low``.
    """
    if not is_integer(value) or value < low or (high is not None and value > high):
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
    """A finite number in [low, high], with ``open_low`` in (low, high]; ``high`` may be infinite.

    ``default`` is ``low``.
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
    """A pair (low, high) of numbers with 0 <= low < high <= 1."""
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    found = len(pair) == 2 and all(is_number(number) and 0 <= number <= 1 for number in pair)
    if not found or pair[0] >= pair[1]:
        instead = (pair[1], pair[0]) if found and pair[0] > pair[1] else example
        allowed = "(low, high) with 0 <= low < high <= 1, where 1 is the start of a run"
        fail(where, key, value, allowed, instead)
    return float(pair[0]), float(pair[1])


def check_choice(where: str, key: str, value: Any, known: Collection[str]) -> str:
    """One of ``known``, of which the first is suggested where none is close."""
    if not isinstance(value, str) or value not in known:
        instead = nearest(value, known) or next(iter(known))
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
        if key not in known:
            instead = f"{did_you_mean(key, known)}Known: {', '.join(known)}"
            raise ToMeError(f"{what} has no option {key!r}: {(elsewhere or {}).get(key, instead)}")


def did_you_mean(wrong: Any, known: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` for a message; empty if no known name is similar."""
    close = nearest(wrong, known)
    return "" if close is None else f"did you mean {close!r}? "


def nearest(wrong: Any, known: Iterable[str]) -> str | None:
    """The known name that is most similar to a wrong one; None if none is."""
    return next(iter(difflib.get_close_matches(str(wrong), list(known), n=1)), None)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer, numpy's included; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def plain(value: Any) -> Any:
    """``value`` as JSON would return it: Python numbers for numpy's, lists for tuples."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if is_integer(value) else float(value)


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
    """``value`` immutable: frozen dicts, tuples for lists, Python numbers for numpy's; keys that
    are numbers as strings, as of JSON, become integers."""
    if isinstance(value, Mapping):
        keys = [int(key) if str(key).isdecimal() else plain(key) for key in value]
        return FrozenDict(zip(keys, map(frozen, value.values())))
    if isinstance(value, (list, tuple)):
        return tuple(map(frozen, value))
    return plain(value)


class Options:
    """Base class of options: by keyword, immutable, valid.

    Subclasses are ``@dataclass(frozen=True, init=False)`` and check their values in ``_check``.

    Raises:
        ToMeError: an unknown option or a wrong value, in all ways to make one.
    """

    _what = ""  # has these options, for messages
    _example = ""  # of a dict of them
    _note = ""  # on what is no dict
    _elsewhere: ClassVar[Mapping[str, str]] = {}  # options of something else -> what to write

    def __init__(self, *positional: Any, **options: Any) -> None:
        if positional:
            raise ToMeError(
                f"options of {self._what} are passed by name, got {positional[0]!r}; write for "
                f"example {type(self).__name__}{self._example.removeprefix('dict')}"
            )
        check_keys(self._what, options, self.names(), self._elsewhere)
        for field in fields(self):  # type: ignore[arg-type]
            self._set(field.name, options.get(field.name, field.default))
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:
        raise NotImplementedError

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def coerce(cls: type[T], config: Any = None, **changes: Any) -> T:
        """From whatever a user passes: None, a mapping of options, or an instance; keywords win."""
        if isinstance(config, cls):
            return config.replace(**changes) if changes else config
        if config is not None and not isinstance(config, Mapping):
            raise ToMeError(
                f"options of {cls._what} must be a dict such as {cls._example} or a "
                f"{cls.__name__}, got {config!r}{cls._note}"
            )
        return cls(**cls._overridden(config or {}, changes))

    def replace(self: T, **changes: Any) -> T:
        """A changed, validated copy."""
        return type(self)(**self._overridden(self.to_dict(), changes))

    @staticmethod
    def _overridden(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, **changes}

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all options; :meth:`coerce` is the inverse."""
        return {name: getattr(self, name) for name in self.names()}
