# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The one error type of the package, and what its messages say of a name that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ToMeError(ValueError):
    """A request that token merging cannot honour.

    Raised for bad configuration values, models without anything to merge and
    sizes that do not fit. The message always says what was found and what to
    write instead. A :class:`ValueError`, so callers that guard against bad
    values in general need not know this package.
    """


def nearest(wrong: Any, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a wrong one; None if none is."""
    return next(iter(difflib.get_close_matches(str(wrong), list(known), n=1)), None)


def check_choice(where: str, key: str, value: Any, known: Iterable[str], otherwise: str) -> None:
    """Raise :class:`ToMeError` unless a value is one of the known; it says what to write.

    Args:
        where: what the message begins with, such as ``"refresh: "``.
        key: the option's name.
        value: what was found.
        known: what can be.
        otherwise: what to suggest where none of them is like it.
    """
    if not isinstance(value, str) or value not in known:
        close = nearest(value, known) or otherwise
        raise ToMeError(
            f"{where}{key}={value!r} must be one of {', '.join(known)}; write {key}={close!r}"
        )


def check_keys(what: str, spec: Iterable[Any], known: Iterable[str]) -> None:
    """Raise :class:`ToMeError` for the first key of ``spec`` that is not among the known."""
    known = list(known)
    for key in spec:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ToMeError(f"{what} has no key {key!r}: {hint}Known: {', '.join(known)}")


def did_you_mean(wrong: Any, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for a message, or nothing if no known name is like it."""
    close = nearest(wrong, known)
    return "" if close is None else f"did you mean {close!r}? "
