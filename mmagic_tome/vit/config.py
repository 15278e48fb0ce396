# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options of token merging in a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ToMeError
from ..merging.sequence import COMBINATIONS, DISTANCES, PARTITIONS
from ..validate import check_bool, check_choice, check_integer, check_keys, check_number
from .schedules import removed_per_block

# Options of diffusion models -> what to write.
_DIFFUSION = {
    "ratio": "ratio is for diffusion models; write r=8, the tokens to remove per block",
    "targets": "targets is for diffusion models; leave it out",
}

#: What similarity is measured on.
METRICS = ("keys", "queries", "values", "features", "attention")

_CHOICES = {
    "metric": METRICS,
    "distance": DISTANCES,
    "combination": COMBINATIONS,
    "partition": PARTITIONS,
}


@dataclass(frozen=True)
class ViTConfig:
    """Validated options of :func:`~.apply.apply_tome_vit`, which explains them.

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

    def __new__(cls, **options: Any) -> ViTConfig:
        # Before dataclass's own __init__, which would raise a TypeError without a suggestion.
        check_keys("a vision transformer's token merging", options, cls.names(), _DIFFUSION)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {}
        if self.target_speedup is None:
            r = checked["r"] = 8 if self.r is None else self.r
            # A list of any length: only apply_tome_vit knows the number of blocks.
            removed_per_block(r, len(r) if isinstance(r, Sequence) else 1)
        elif self.r is not None:
            raise ToMeError("r and target_speedup exclude each other; write one of them")
        else:
            target = check_number("", "target_speedup", self.target_speedup, 1, math.inf)
            checked["target_speedup"] = target
        for name, known in _CHOICES.items():
            check_choice("", name, getattr(self, name), known)
        for name in ("prop_attn", "trace_source"):
            check_bool("", name, getattr(self, name))
        if self.unmerge is not None:
            check_bool("", "unmerge", self.unmerge)
        checked["seed"] = check_integer("", "seed", self.seed, 0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options."""
        return [field.name for field in fields(cls)]

    @classmethod
    def coerce(
        cls, config: ViTConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> ViTConfig:
        """A config from a config, a dict or None; ``options`` override it."""
        if config is None:
            return cls(**options)
        if isinstance(config, cls):
            return config.replace(**options) if options else config
        if not isinstance(config, Mapping):
            raise ToMeError(
                f"a config must be a ViTConfig or a dict of its options, got {config!r}; write "
                "dict(r=8)"
            )
        return cls(**_overridden(config, options))

    def replace(self, **options: Any) -> ViTConfig:
        """A config with other values; ``r`` and ``target_speedup`` replace each other."""
        return type(self)(**_overridden(self.to_dict(), options))

    def to_dict(self) -> dict[str, Any]:
        """The options as keyword arguments of :func:`~.apply.apply_tome_vit`."""
        return asdict(self)


def _overridden(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**config, **options}
    for name, other in (("r", "target_speedup"), ("target_speedup", "r")):
        if options.get(name) is not None and other not in options:
            merged[other] = None
    return merged
