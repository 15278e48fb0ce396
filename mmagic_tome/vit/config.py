# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options of token merging in a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ToMeError
from ..merging.sequence import COMBINATIONS, DISTANCES, PARTITIONS
from ..validate import Options, check_bool, check_choice, check_integer, check_number
from .schedules import removed_per_block

#: What similarity is measured on.
METRICS = ("keys", "queries", "values", "features", "attention")

_CHOICES = {
    "metric": METRICS,
    "distance": DISTANCES,
    "combination": COMBINATIONS,
    "partition": PARTITIONS,
}


@dataclass(frozen=True, init=False)
class ViTConfig(Options):
    """Options of token merging in a vision transformer.

    The defaults are the best settings of "Token Merging: Your ViT But Faster" (Bolya et al.,
    ICLR 2023, arXiv 2210.09461).

    Args:
        r: tokens to remove per block: an int (default 8), ``(r, inflect)`` or a list; see
            :func:`~.schedules.removed_per_block`. A block removes at most half of its tokens.
        target_speedup (float | None): instead of ``r``: the smallest constant r that divides the
            blocks' multiply-adds by this much. It is found for the number of tokens of each
            forward and is then in ``handle.r``. :func:`~.schedules.relative_cost` counts, nothing
            is measured: embedding, head, and merging itself are excluded. Default None.
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
        for name in ("prop_attn", "trace_source"):
            check_bool("", name, getattr(self, name))
        if self.unmerge is not None:
            check_bool("", "unmerge", self.unmerge)
        self._set("seed", check_integer("", "seed", self.seed, 0))

    @staticmethod
    def _overridden(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """``r`` and ``target_speedup`` replace each other."""
        merged = {**options, **changes}
        for name, other in (("r", "target_speedup"), ("target_speedup", "r")):
            if changes.get(name) is not None and other not in changes:
                merged[other] = None
        return merged
