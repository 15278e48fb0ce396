# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How many tokens every block of a vision transformer removes.

Source: "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, arXiv 2210.09461).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import ToMeError
from ..validate import is_integer, is_number


def removed_per_block(r: Any, blocks: int) -> list[int]:
    """Tokens to remove in every block.

    Args:
        r: an int: the same in every block; ``(r, inflect)``: linear from r (1 - inflect) in the
            first block to r (1 + inflect) in the last, each rounded to the nearest integer (halves
            up), inflect in [-1, 1], where -1 is the paper's decreasing schedule; a list: one int
            per block from the first on, padded with zeros.
        blocks (int): L.

    Returns:
        list: L ints. A block removes at most half of its unprotected tokens, whatever they say.

    Raises:
        ToMeError: anything else.

    Example:
        >>> removed_per_block((8, -1), 5)
        [16, 12, 8, 4, 0]
    """
    if _is_count(r):
        return [r] * blocks
    if isinstance(r, tuple):
        if len(r) != 2 or not _is_count(r[0]):
            raise ToMeError(
                f"r as a tuple is (r, inflect), for example (8, -1.0), got {r!r}; for one number "
                "per block write a list"
            )
        count, inflect = r
        if not is_number(inflect) or not -1 <= inflect <= 1:
            raise ToMeError(f"inflect in r=(r, inflect) must be in [-1, 1], got {inflect!r}")
        steps = [2 * block / (blocks - 1) - 1 if blocks > 1 else 0 for block in range(blocks)]
        return [math.floor(count * (1 + inflect * step) + 0.5) for step in steps]
    if isinstance(r, Sequence) and not isinstance(r, str):
        for count in r:
            if not _is_count(count):
                raise ToMeError(f"r as a list has an integer >= 0 per block, got {count!r} in it")
        if len(r) > blocks:
            raise ToMeError(
                f"r has {len(r)} entries but the model has {blocks} blocks; write at most {blocks}"
            )
        return [*r, *[0] * (blocks - len(r))]
    raise ToMeError(
        f"r must be an integer >= 0, (r, inflect) or a list of one integer per block, got {r!r}"
    )


def tokens_per_block(removed: Sequence[int], tokens: int, prefix: int) -> list[tuple[int, int]]:
    """(before, after) merging in every block.

    Args:
        removed: of :func:`removed_per_block`.
        tokens (int): N, of the first block, protected ones included.
        prefix (int): number of protected tokens.
    """
    counts = []
    for count in removed:
        kept = tokens - max(0, min(count, (tokens - prefix) // 2))
        counts.append((tokens, kept))
        tokens = kept
    return counts


def relative_cost(counts: Sequence[tuple[int, int]], width: int, hidden: int) -> float:
    """Multiply-adds of the blocks.

    Attention and its four projections run on the n tokens before merging, the feed-forward on the m
    tokens after it: 4 n C^2 + 2 n^2 C + 2 m C H.

    Args:
        counts: of :func:`tokens_per_block`.
        width (int): C, channels.
        hidden (int): H, channels inside the feed-forward.
    """
    return float(
        sum(4 * n * width**2 + 2 * n**2 * width + 2 * m * width * hidden for n, m in counts)
    )


def removed_for_speedup(
    target: float, blocks: int, tokens: int, prefix: int, width: int, hidden: int
) -> int:
    """The smallest constant r whose :func:`relative_cost` is at most 1 / target of the baseline's.

    Raises:
        ToMeError: no r reaches the target.
    """
    baseline = relative_cost([(tokens, tokens)] * blocks, width, hidden)

    def reached(r: int) -> float:
        counts = tokens_per_block([r] * blocks, tokens, prefix)
        return baseline / relative_cost(counts, width, hidden)

    # Bisection: no block gets more tokens at a larger r.
    low, high = 0, max(0, (tokens - prefix) // 2)
    if reached(high) < target:
        raise ToMeError(
            f"target_speedup={target:g} is out of reach with {tokens} tokens in {blocks} blocks: "
            f"merging as much as possible in every block gives {reached(high):.1f}; write a "
            "smaller one"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= target else (middle + 1, high)
    return low


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0
