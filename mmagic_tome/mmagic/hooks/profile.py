# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The time of the network, its blocks and its targets, by method."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from ...lab.measure import StepMarks
from ...models import find_adapter

NETWORK = "network"


class Profile:
    """Times every call of a model's network, its transformer blocks and their targets.

    The time of a target includes merging and unmerging, that of a block also the matching. Calls
    that step caching skips count for the network; blocks inside of them are not called. On CUDA
    times are those of events, without synchronization.

    Args:
        model: Whatever ``apply_tome`` takes.
    """

    def __init__(self, model: nn.Module) -> None:
        adapter, network = find_adapter(model)
        self._device = next(network.parameters()).device
        self._modules = [(NETWORK, network)]
        for block in adapter.blocks(network):
            self._modules.append((f"{block.name} (block)", block.module))
            for kind, target in block.targets.items():
                parts = [target] if isinstance(target, nn.Module) else target
                self._modules += [(f"{block.name}.{kind}", part) for part in parts]
        self._seconds: dict[tuple[str, str], list[float]] = {}  # (module, method) -> its calls

    @contextmanager
    def of(self, method: str) -> Iterator[None]:
        """Around the calls of a method."""
        with ExitStack() as stack:
            marks = [
                (name, stack.enter_context(StepMarks(module, self._device)))
                for name, module in self._modules
            ]
            yield
        for name, one in marks:
            self._seconds.setdefault((name, method), []).extend(one.seconds())

    def write(self, path: str | Path) -> str:
        """Write a row per module and method as JSON: ``module``, ``method``, ``ms`` (median time of
        a call) and ``calls``; return them as a table."""
        import pandas

        rows = [
            (*key, 1000 * statistics.median(seconds), len(seconds))
            for key, seconds in self._seconds.items()
            if seconds
        ]
        frame = pandas.DataFrame(rows, columns=["module", "method", "ms", "calls"])
        frame.to_json(path, orient="records", indent=1)
        table = frame.pivot(index="module", columns="method", values="ms")
        table = table.loc[frame["module"].unique(), frame["method"].unique()].rename_axis(None)
        return table.to_string(float_format="{:.3f}".format, na_rep="-")
