# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The base class of merging methods, and their registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ToMeError
from ..merging import Plan, tokens_to_remove
from ..validate import nearest

METHODS: dict[str, type[Method]] = {}

# Names of methods elsewhere -> their names here, for error messages.
_OTHER_NAMES = {"tokendownsampling": "todo", "tomesd": "tome"}
#: Methods that were offered until they were measured to be slower or further from the baseline.
REMOVED = ("downsample", "importance", "pitome", "prune", "sito", "threshold", "tofu", "toma")


@dataclass(frozen=True)
class PlanRequest:
    """What a method may use to make a plan, besides the tokens."""

    height: int  # of the grid; the tokens come row by row
    width: int
    sx: int  # width of a cell in tokens
    sy: int
    level: int  # number of the resolution level among the merged ones, 0 = finest grid
    exact: bool  # match in full precision
    # () -> (destinations (D,), sources (S,)) int64, one destination per cell, random or regular.
    layout: Callable[[], tuple[Tensor, Tensor]]

    @property
    def cells(self) -> int:
        """Number of complete cells."""
        return (self.height // self.sy) * (self.width // self.sx)


class Method:
    """A way to choose which tokens become one.

    Subclasses take their options as keyword arguments with defaults, check them in ``__init__``
    (ToMeError for one that is out of range), and implement :meth:`match`, or :meth:`plan` where
    the number of tokens is not the usual one. They hold no state between calls.
    """

    where = ""  # what the message of a wrong option begins with: the method's name
    keeps_queries = False  # merge keys and values of self-attention only
    ceiling = 1.0  # largest ratio for any cells; 1: cells alone limit it

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> Plan | None:
        """Make a plan that removes the fraction ``ratio``, in [0, ceiling], of the tokens
        ``metric`` (B, N, C), the block's input; None if there is nothing to merge."""
        r = self.removed(metric.shape[1], ratio, request)
        return self.match(metric, r, request) if r > 0 else None

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan | None:
        """Make a plan that removes r >= 1 tokens; arguments and result are those of ``plan``."""
        raise NotImplementedError

    def removed(self, tokens: int, ratio: float, request: PlanRequest) -> int:
        """r = min(int(N * ratio), sources); 0 for a grid without a complete cell."""
        cells = request.cells
        return tokens_to_remove(tokens, tokens - cells, ratio) if cells else 0


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: ``method='name'`` in a config means this class."""

    def register(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        cls.where = f"method {name!r}: "
        return cls

    return register


def build_method(spec: str | Mapping[str, Any]) -> Method:
    """Build the method that ``method=...`` of a config names.

    Args:
        spec: a registered name, or a dict with the name under ``type`` and the method's options.

    Raises:
        ToMeError: unknown name or option, an option out of range.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"type": spec}
    if "type" not in options:
        raise ToMeError(
            f"method={options!r} names no method: write its name under 'type', such as "
            "dict(type='todo', downsample_factor=3). One method serves all targets"
        )
    name = options.pop("type")
    if not isinstance(name, str) or name not in METHODS:
        if name in REMOVED:
            raise ToMeError(
                f"method {name!r} is no longer offered: at the same speed method='tome' is closer "
                "to the baseline (docs/explanation/method_notes.md); leave it out"
            )
        plain = "".join(filter(str.isalnum, str(name).lower()))
        close = _OTHER_NAMES.get(plain) or nearest(plain, METHODS)
        hint = f"did you mean {close!r}? " if close else ""
        raise ToMeError(f"unknown method {name!r}: {hint}Known: {', '.join(sorted(METHODS))}")
    cls = METHODS[name]
    known = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in known:
            raise ToMeError(
                f"method {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}"
            )
    return cls(**options)
