# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Checks of methods' options: one line that says what was found and what to write instead."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..errors import ToMeError
from ..errors import check_choice as check_name


def check_number(
    method: str,
    option: str,
    value: Any,
    low: float,
    high: float,
    default: float,
    open_low: bool = False,
) -> float:
    """``value`` as a float.

    Args:
        method, option (str): for the message.
        value: what the user wrote.
        low, high (float): allowed range, both ends included; ``high`` may be infinite.
        default (float): what to suggest in place of something that is no number.
        open_low (bool): leave ``low`` out. Default False.

    Raises:
        ToMeError: not a number in the range.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    finite = number and math.isfinite(value)
    fits = finite and low <= value <= high and not (open_low and value == low)
    if not fits:
        top = "" if math.isinf(high) else f" and at most {high:g}"
        bottom = f"above {low:g}" if open_low else f"at least {low:g}"
        nearest = min(max(value, low), high) if finite else default
        instead = default if open_low and nearest == low else nearest
        raise ToMeError(
            f"method {method!r}: {option}={value!r} must be a number {bottom}{top}; "
            f"write {option}={instead:g}"
        )
    return float(value)


def check_integer(method: str, option: str, value: Any, low: int, high: int) -> int:
    """``value``, an integer in [low, high].

    Raises:
        ToMeError: anything else.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        finite = isinstance(value, numbers.Real) and math.isfinite(value)
        allowed = min(max(round(value), low), high) if finite else low
        raise ToMeError(
            f"method {method!r}: {option}={value!r} must be an integer in [{low}, {high}]; "
            f"write {option}={allowed}"
        )
    return int(value)


def check_choice(method: str, option: str, value: Any, allowed: tuple[str, ...]) -> str:
    """``value``, one of ``allowed``.

    Raises:
        ToMeError: anything else.
    """
    check_name(f"method {method!r}: ", option, value, allowed, allowed[0])
    return value
