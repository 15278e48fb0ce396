# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options of token merging in a vision transformer, and how many tokens every block removes.

Source: "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, arXiv 2210.09461).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ToMeError
from ..merging.sequence import COMBINATIONS, DISTANCES, PARTITIONS
from ..validate import (
    Options,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    is_integer,
    is_number,
)

_CHOICES = {
    "metric": ("keys", "queries", "values", "features", "attention"),
    "distance": DISTANCES,
    "combination": COMBINATIONS,
    "partition": PARTITIONS,
}


@dataclass(frozen=True, init=False)
class ViTConfig(Options):
    """Options of token merging in a vision transformer; the defaults are the paper's best settings.

    Args:
        r: tokens to remove per block: an int (default 8), ``(r, inflect)`` or a list; see
            :func:`removed_per_block`. A block removes at most half of its tokens.
        target_speedup (float | None): instead of ``r``: the smallest constant r that divides the
            blocks' multiply-adds by this much. It is found for the number of tokens of each
            forward and is then in ``handle.r``. :func:`relative_cost` counts, nothing is measured:
            embedding, head, and merging itself are excluded. Default None.
        prop_attn (bool): proportional attention (default True). The paper needs it for supervised
            models without training, and disables it for masked autoencoders without training.
        metric (str): features to compare: 'keys' (default), 'queries', 'values' (mean over the
            heads), 'features' (the tokens between attention and feed-forward) or 'attention'
            (output of the attention).
        distance (str): 'cosine' (default), 'dot', 'euclidean', 'softmax'.
        combination (str): 'weighted' (default: average weighted by size), 'mean', 'max' or 'drop'
            (the destination stays as it is). Sizes add up in all of them.
        partition (str): 'alternating' (default), 'sequential', 'random' (a hash of ``seed`` and
            block).
        trace_source (bool): record which token contains which patch: ``handle.source``. Default
            False.
        unmerge (bool | None): unmerge the last block's output, so that it has the baseline's shape
            and averages over it count every patch once. None (default): only if what follows reads
            more than the class token: SigLIP, VideoMAE, Whisper, timm with other pooling than
            'token', and heads that average or decode.
        seed (int): of the random partition. Default 0.

    Raises:
        ToMeError: an unknown option or an invalid value.
    """

    r: Any = None  # 8 unless target_speedup is set
    target_speedup: float | None = None
    prop_attn: bool = True
    metric: str = "keys"
    distance: str = "cosine"
    combination: str = "weighted"
    partition: str = "alternating"
    trace_source: bool = False
    unmerge: bool | None = None
    seed: int = 0

    _what = "a vision transformer's token merging"
    _example = "dict(r=8)"
    # Options of diffusion models -> what to write.
    _elsewhere: ClassVar[Mapping[str, str]] = {
        "ratio": "ratio is for diffusion models; write r=8, the tokens to remove per block",
        "targets": "targets is for diffusion models; leave it out",
    }

    def _check(self) -> None:
        if self.target_speedup is None:
            self._set("r", 8 if self.r is None else self.r)
            # A list of any length: only apply_tome_vit knows the number of blocks.
            removed_per_block(self.r, len(self.r) if isinstance(self.r, Sequence) else 1)
        elif self.r is not None:
            raise ToMeError("r and target_speedup exclude each other; write one of them")
        else:
            target = check_number("", "target_speedup", self.target_speedup, 1, math.inf)
            self._set("target_speedup", target)
        for name, known in _CHOICES.items():
            check_choice("", name, getattr(self, name), known)
        for name in ("prop_attn", "trace_source", "unmerge"):
            if name != "unmerge" or self.unmerge is not None:
                check_bool("", name, getattr(self, name))
        self._set("seed", check_integer("", "seed", self.seed, 0))

    @staticmethod
    def _overridden(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """``r`` and ``target_speedup`` replace each other."""
        merged = {**options, **changes}
        for name, other in (("r", "target_speedup"), ("target_speedup", "r")):
            if changes.get(name) is not None and other not in changes:
                merged[other] = None
        return merged


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
    if isinstance(r, str) or not isinstance(r, Sequence) or not all(map(_is_count, r)):
        raise ToMeError(
            f"r must be an integer >= 0, (r, inflect) or a list of one integer per block, got {r!r}"
        )
    if len(r) > blocks:
        raise ToMeError(
            f"r has {len(r)} entries but the model has {blocks} blocks; write at most {blocks}"
        )
    return [*r, *[0] * (blocks - len(r))]


def tokens_per_block(removed: Sequence[int], tokens: int, prefix: int) -> list[tuple[int, int]]:
    """(before, after) merging in every block, from the tokens of the first, of which ``prefix`` are
    protected."""
    counts = []
    for count in removed:
        kept = tokens - max(0, min(count, (tokens - prefix) // 2))
        counts.append((tokens, kept))
        tokens = kept
    return counts


def relative_cost(counts: Sequence[tuple[int, int]], width: int, hidden: int) -> float:
    """Multiply-adds of the blocks with ``counts`` of :func:`tokens_per_block`: attention and its
    four projections run on the n tokens before merging, the feed-forward on the m tokens after it,
    4 n C^2 + 2 n^2 C + 2 m C H, with C the width and H the hidden channels."""
    return float(
        sum(4 * n * width**2 + 2 * n**2 * width + 2 * m * width * hidden for n, m in counts)
    )


def removed_for_speedup(
    target: float, blocks: int, tokens: int, prefix: int, width: int, hidden: int
) -> int:
    """The smallest constant r whose :func:`relative_cost` is at most 1 / target of the baseline's;
    ToMeError if no r reaches the target."""
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
