# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the handles of all techniques have in common."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from .patch import Patch, find_patch, remove, restore

P = TypeVar("P", bound=Patch)


@dataclass
class Part(Generic[P]):
    """One network with one patch."""

    name: str  # '' or the beginning of its names, such as 'transformer_2.'
    network: Any  # weak reference to it: a handle keeps no model alive
    patch: P

    @property
    def active(self) -> bool:
        """Whether the network still carries the patch."""
        network = self.network()
        return network is not None and find_patch(network, type(self.patch)) is self.patch


class Handle(Generic[P]):
    """A view on what one technique has applied to the networks of a model.

    As a context manager it removes on exit, and puts back what was there before.

    Args:
        parts: (name, network, patch) of every network, the first denoiser first.
        replaced: (network, what :func:`~.patch.remove` returned) of what was there before.
    """

    technique = "token merging"  #: or 'step caching'
    _remove, _restore = staticmethod(remove), staticmethod(restore)

    def __init__(
        self,
        parts: Sequence[tuple[str, nn.Module, P]],
        replaced: Sequence[tuple[nn.Module, list]] = (),
    ) -> None:
        self._parts = [Part(name, weakref.ref(network), patch) for name, network, patch in parts]
        self._replaced = [(weakref.ref(network), removed) for network, removed in replaced]

    @property
    def _patches(self) -> list[P]:
        return [part.patch for part in self._parts]

    @property
    def _patch(self) -> P:
        return self._parts[0].patch

    @property
    def network(self) -> nn.Module | None:
        """The network, or the first of several; None once it is gone."""
        return self._parts[0].network()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name, ControlNets included."""
        found = {part.name.rstrip("."): part.network() for part in self._parts}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def active(self) -> bool:
        """False once this was removed or replaced."""
        return self._parts[0].active

    @property
    def config(self) -> Any:
        """The options in force."""
        return self._patch.config

    @property
    def description(self) -> str:
        """The options in a few words."""
        raise NotImplementedError

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The baseline model, bit for bit, for calls in this thread while entered.

        What is kept between steps is forgotten at both ends.
        """
        with contextlib.ExitStack() as stack:
            for patch in self._patches:
                stack.enter_context(patch.disabled())
            yield

    def remove(self) -> None:
        """Take it out of the networks again, exactly; a second call does nothing."""
        for part in self._parts:
            if part.active:
                self._remove(part.network(), part.patch)

    def reset_run(self) -> None:
        """Forget what is kept between steps: the next call begins a new denoising run.

        Only needed where a run was left in the middle and its tensors should be freed.
        """
        for patch in self._patches:
            patch.forget_run()

    def reset_stats(self) -> None:
        """Set what :meth:`stats` returns back to what it was before the first call."""
        for patch in self._patches:
            patch.reset_stats()

    def stats(self) -> list[dict[str, Any]]:
        """What was done where, one dict per place."""
        raise NotImplementedError

    def summary(self) -> str:
        """A table of :meth:`stats` to print, with the options in its title."""
        title = f"{self.technique} in {self._class_names}: {self.description}"
        if not self.active:
            return f"{title} (removed)"
        rows = self._rows()
        if not any(row.get("tokens") or row.get("computed") for row in rows):
            title += " (not run yet)"
        lines = [list(rows[0])]
        lines += [["-" if cell is None else str(cell) for cell in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        for number, (first, *rest) in enumerate(lines):
            numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
            lines[number] = "  ".join([first.ljust(widths[0]), *numbers]).rstrip()
        return "\n".join([title, *lines])

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of :meth:`summary`, None for what is unknown."""
        return self.stats()

    @property
    def _class_names(self) -> str:
        names = [type(network).__name__ for network in self.networks.values()]
        return ", ".join(dict.fromkeys(names)) or "a model that is gone"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # One that was removed or replaced in the meantime has nothing to undo.
        if not self.active:
            return
        self.remove()
        for network, removed in self._replaced:
            if network() is not None:
                self._restore(network(), removed)

    def __repr__(self) -> str:
        removed = "" if self.active else ", removed"
        return f"{type(self).__name__}({self._class_names}, {self.description}{removed})"
