# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The one error type of the package."""

from __future__ import annotations


class ToMeError(ValueError):
    """A request that token merging cannot honour.

    Raised for bad configuration values, models without anything to merge and
    sizes that do not fit. The message always says what was found and what to
    write instead. A :class:`ValueError`, so callers that guard against bad
    values in general need not know this package.
    """
