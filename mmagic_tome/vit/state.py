# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options of token merging in a vision transformer, and what its hooks share."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ToMeError
from ..merging.sequence import COMBINATIONS, DISTANCES, PARTITIONS, Match

#: What similarity is measured on.
METRICS = ("keys", "queries", "values", "features", "attention")


@dataclass(frozen=True)
class ViTOptions:
    """Validated options of :func:`~.engine.apply_tome_vit`, which says what each means."""

    r: Any = 8
    target_speedup: float | None = None
    prop_attn: bool = True
    metric: str = "keys"
    distance: str = "cosine"
    combination: str = "weighted"
    partition: str = "alternating"
    trace_source: bool = False
    unmerge: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "metric": METRICS,
            "distance": DISTANCES,
            "combination": COMBINATIONS,
            "partition": PARTITIONS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = ", ".join(map(repr, known))
                raise ToMeError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        for name in ("prop_attn", "trace_source"):
            if not isinstance(getattr(self, name), bool):
                raise ToMeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.unmerge not in (None, True, False):
            raise ToMeError(f"unmerge must be True, False or None, got {self.unmerge!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ToMeError(f"seed must be an integer >= 0, got {self.seed!r}")
        target = self.target_speedup
        if target is not None and (
            isinstance(target, bool) or not isinstance(target, (int, float)) or not target >= 1
        ):
            raise ToMeError(f"target_speedup must be a number >= 1, got {target!r}")

    def to_dict(self) -> dict[str, Any]:
        """The options as keyword arguments of :func:`~.engine.apply_tome_vit`."""
        return asdict(self)


class ViTState:
    """Everything the hooks of one vision transformer share.

    Attributes:
        options (ViTOptions): assign others to change them between forwards.
        removed (list | None): tokens to remove per block; None: chosen by ``target_speedup`` for
            the number of tokens of each forward.
        size, source, tokens: of the last forward that came to its end, see :class:`ViTHandle`.
        hooks (list): what ``remove()`` takes out.
    """

    def __init__(
        self,
        options: ViTOptions,
        removed: list[int] | None,
        prefix: int,
        blocks: list[str],
        width: int,
        hidden: int,
        unmerges: bool,
    ) -> None:
        self.options = options
        self.removed = removed
        self.prefix = prefix
        self.blocks = blocks
        self.width = width
        self.hidden = hidden
        self.unmerges = unmerges
        self.hooks: list[Any] = []
        self.size: Tensor | None = None
        self.source: Tensor | None = None
        self.tokens: list[tuple[int, int]] | None = None
        self._threads = threading.local()
        self._compiled = ViTForward()

    @property
    def forward(self) -> ViTForward:
        """What belongs to the forward that is under way in this thread.

        Compiled code knows no threads: all of it shares one.
        """
        if torch.compiler.is_compiling():
            return self._compiled
        forward = getattr(self._threads, "forward", None)
        if forward is None:
            forward = self._threads.forward = ViTForward()
        return forward

    @property
    def traces(self) -> bool:
        """Whether it is noted which token holds which patch."""
        return self.options.trace_source or self.unmerges

    def hook(self, module: nn.Module, before: Any = None, after: Any = None) -> None:
        """Register hooks that :meth:`remove` takes out."""
        if before is not None:
            self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            # In front of all others, so that whoever else looks (the hidden states that
            # transformers can return, a user's hook) sees merged tokens, whoever came first.
            hook = module.register_forward_hook(after, prepend=True, with_kwargs=True)
            self.hooks.append(hook)

    def remove(self) -> None:
        """Take everything out of the model."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_threads"], state["_compiled"]
        # What was seen is no part of a copy.
        state.update(size=None, source=None, tokens=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._threads = threading.local()
        self._compiled = ViTForward()


class ViTForward:
    """What is known while the blocks run, from block to block.

    Attributes:
        removed (list): tokens to remove per block, in this forward.
        size (Tensor | None): (B, N) float, how many patches each token stands for; None before
            anything was merged.
        source (Tensor | None): (B, N0) int64, the token that holds each of the first tokens.
        metric (Tensor | None): (B, N, C), what the block that runs measures similarity on.
        match (Match | None): of the block that runs.
        tokens (list): (before, after) of every block that came to its end.
    """

    def __init__(self) -> None:
        self.begin([])

    def begin(self, removed: list[int]) -> None:
        """Forget the last forward."""
        self.removed = removed
        self.size: Tensor | None = None
        self.source: Tensor | None = None
        self.metric: Tensor | None = None
        self.match: Match | None = None
        self.tokens: list[tuple[int, int]] = []


class Saved:
    """Input tensor of a block -> what was known when it came in, for as long as it lives.

    Gradient checkpointing runs a block again during the backward, with the same tensor, when
    its model has long gone on.
    """

    def __init__(self) -> None:
        self._saved = WeakTensorKeyDictionary()

    def get(self, x: Tensor) -> Any:
        """What was kept with ``x``, or None."""
        return self._saved.get(x)

    def keep(self, x: Tensor, value: Any) -> None:
        """Keep ``value`` as long as ``x`` lives."""
        self._saved[x] = value

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._saved = WeakTensorKeyDictionary()
