# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Interleaved rounds: whatever slows the machine for a while slows all methods alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def balanced_order(names: Sequence[str], turn: int) -> list[str]:
    """Return the order in which methods run in a round.

    A run leaves its mark on caches, on the heap and on the processor's clock. With a rotated order
    every method would run after the same other one in all rounds. Here, over n rounds (2 n where n
    is odd), every method runs after every other one equally often, and equally often at every
    place of a round (Williams, Experimental designs balanced for the estimation of residual effects
    of treatments, 1949).

    Args:
        names: Of the n methods.
        turn: Number of the round, from 0.
    """
    count = len(names)
    # 0, 1, n-1, 2, n-2, ...: every difference between neighbours occurs once.
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    order = [names[(step + turn) % count] for step in zigzag]
    # With an odd count each difference comes from one side only; the mirror image has the other.
    return order[::-1] if count % 2 and turn // count % 2 else order


def interleaved(
    calls: Mapping[str, Callable[[], T]],
    turns: Iterable[int],
    progress: Callable[[int, str], object] | None = None,
) -> Iterator[tuple[int, str, T]]:
    """Call every method once per round.

    Garbage is collected before each call. Objects that exist when the rounds start are left out of
    it, so that a collection takes milliseconds however many modules are loaded.

    Args:
        calls: Per method a function that does one run; it may warm up, measure, or both.
        turns: Numbers of the rounds, such as ``range(done, rounds)`` to go on.
        progress: Called with the number of the round and the name before each call.

    Yields:
        tuple: Number of the round, name, and what the call returned.
    """
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        for turn in turns:
            for name in balanced_order(list(calls), turn):
                if progress is not None:
                    progress(turn, name)
                gc.collect()
                yield turn, name, calls[name]()
    finally:
        if not frozen:  # else the caller has frozen objects and goes on with them
            gc.unfreeze()
