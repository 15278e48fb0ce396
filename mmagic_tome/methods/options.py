# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Checks of methods' options: one line that says what was found and what to write instead."""

from __future__ import annotations

import math
from typing import Any

from ..errors import ToMeError


def check_number(
    method: str, option: str, value: Any, low: float, high: float, open_low: bool = False
) -> float:
    """``value`` as a float.

    Args:
        method, option (str): for the message.
        value: what the user wrote.
        low, high (float): allowed range, both ends included; ``high`` may be infinite.
        open_low (bool): leave ``low`` out. Default False.

    Raises:
        ToMeError: not a number in the range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and low <= value <= high
    if not fits or (open_low and value == low):
        top = "" if math.isinf(high) else f" and at most {high:g}"
        bottom = f"above {low:g}" if open_low else f"at least {low:g}"
        raise ToMeError(f"method {method!r}: {option}={value!r} must be a number {bottom}{top}")
    return float(value)


def check_integer(method: str, option: str, value: Any, low: int, high: int) -> int:
    """``value``, an integer in [low, high].

    Raises:
        ToMeError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        nearest = low if not isinstance(value, int) or value < low else high
        raise ToMeError(
            f"method {method!r}: {option}={value!r} must be an integer in [{low}, {high}]; "
            f"write {option}={nearest}"
        )
    return value


def check_choice(method: str, option: str, value: Any, allowed: tuple[str, ...]) -> str:
    """``value``, one of ``allowed``.

    Raises:
        ToMeError: anything else.
    """
    if value not in allowed:
        raise ToMeError(
            f"method {method!r}: {option}={value!r} must be one of {', '.join(allowed)}; "
            f"write {option}={allowed[0]!r}"
        )
    return value
