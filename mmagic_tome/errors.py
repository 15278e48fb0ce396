# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The one error type of the package, and errors in one line."""

from __future__ import annotations


class ToMeError(ValueError):
    """A request that cannot be honoured: a wrong option, nothing to merge, sizes that do not fit.

    The message says what was found and what to write instead. A :class:`ValueError`, so callers
    that guard against wrong values in general need not know this package.
    """


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line of so many characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."
