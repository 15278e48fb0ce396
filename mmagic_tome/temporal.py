# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is carried from one denoising step to the next: plans, and what merging lost.

Neighbouring steps of a denoising run see nearly the same tokens. So a plan can serve several
steps (:class:`Refresh`), and at the steps in between, what a merged site cannot know can be
added from the last step at which it ran dense (:class:`Residual`)::

    refresh step       D = f(x)                     the dense output, used as it is
                       R = D - U(M(D))              kind 'own':   what merging takes from it
                       R = D - U(f(M x))            kind 'exact': what the merged site misses
                       R = D                        kind 'reuse': all of it
    step in between    U(f(M x)) + R                for 'reuse': R alone, the site is not run

M merges, U unmerges. With ``order=1`` R is extrapolated along the timestep from the last two
refreshes. Site outputs that are reused or extrapolated without any merging are thus the limit
"everything merged".
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from .errors import ToMeError, check_choice, check_keys

_SHARES = ("site", "level")
_KINDS = ("own", "exact", "reuse")


@dataclass(frozen=True)
class Refresh:
    """How long a plan (and a residual) serves.

    Args:
        steps (int): make new ones every this many steps; 1 (default) makes them at each.
        share (str): ``'site'`` (default): every block has its own plan; ``'level'``: the first
            block of a level makes it for all of that level.
        stagger (bool): blocks refresh in turn instead of all at the same step, so that
            all steps cost the same. Needs ``share='site'``. Default False.
        warmup (int): the first steps of a run that all refresh. Default 1; with residuals of
            order 1 write 2, so that there is something to extrapolate from at once.
        at (list of int | None): numbers of the steps that refresh, 0 = the first of a run, in place
            of ``steps``: the caching of CA-ToMe (arXiv 2501.00946). Default None.

    Raises:
        ToMeError: wrong type or value.
    """

    steps: int = 1
    share: str = "site"
    stagger: bool = False
    warmup: int = 1
    at: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for key, low in (("steps", 1), ("warmup", 1)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ToMeError(
                    f"refresh: {key}={value!r} must be an integer of at least {low}; "
                    f"write {key}={low}"
                )
        check_choice("refresh: ", "share", self.share, _SHARES, _SHARES[0])
        if not isinstance(self.stagger, bool):
            raise ToMeError(f"refresh: stagger={self.stagger!r} must be True or False")
        if self.stagger and self.share == "level":
            raise ToMeError(
                "refresh: stagger=True gives every block a turn of its own, share='level' one plan "
                "to all; write share='site'"
            )
        self._check_at()

    def _check_at(self) -> None:
        at = self.at
        if at is None:
            return
        if not isinstance(at, Sequence) or not at or not all(map(_is_step, at)):
            raise ToMeError(
                f"refresh: at={at!r} must be a list of step numbers, 0 = the first; write for "
                "example at=[0, 8, 11, 13, 20]"
            )
        if self.steps != 1 or self.stagger:
            raise ToMeError(
                "refresh: at names the steps that refresh, for all blocks; leave out steps and "
                "stagger, or at"
            )
        object.__setattr__(self, "at", tuple(sorted(set(at))))

    @property
    def keeps(self) -> bool:
        """Whether a plan serves more than one step."""
        return self.steps > 1 or self.at is not None

    @classmethod
    def coerce(cls, spec: Any) -> Refresh:
        """From None, a number of steps, a dict or a Refresh."""
        if spec is None:
            return cls()
        if isinstance(spec, int) and not isinstance(spec, bool):
            return cls(steps=spec)
        return coerce_options(cls, "refresh", spec, "dict(steps=2)")

    def due(self, step: int, turn: int) -> bool:
        """Whether the block with number ``turn`` refreshes at a step (0 = first of the run)."""
        if self.at is not None:
            return step < self.warmup or step in self.at
        return step < self.warmup or (step + (turn if self.stagger else 0)) % self.steps == 0

    def overdue(self, last: int, step: int, turn: int) -> bool:
        """Whether it refreshes, last done at ``last``: also for a step at which it did not run."""
        return any(self.due(one, turn) for one in range(step, last, -1))


@dataclass(frozen=True)
class Residual:
    """What is added to the output of a merged site between refreshes.

    Args:
        kind (str): ``'own'``, ``'exact'`` (default) or ``'reuse'``, see the module.
            'exact' runs the site merged once more at every refresh.
        order (int): 0 (default): the last residual; 1: extrapolated along the timestep from the
            last two, on a line; 2: from the last three, on a parabola.
        gain (float): factor on what is added, in (0, 1]. Default 1.

    Raises:
        ToMeError: wrong type or value.
    """

    kind: str = "exact"
    order: int = 0
    gain: float = 1.0

    def __post_init__(self) -> None:
        check_choice("residual: ", "kind", self.kind, _KINDS, "exact")
        check_order("residual", self.order)
        number = isinstance(self.gain, (int, float)) and not isinstance(self.gain, bool)
        if not number or not 0 < self.gain <= 1:
            raise ToMeError(
                f"residual: gain={self.gain!r} must be a number in (0, 1]; write gain=1.0"
            )

    @classmethod
    def coerce(cls, spec: Any) -> Residual | None:
        """From None, a kind, a dict or a Residual."""
        if spec is None:
            return None
        if isinstance(spec, str):
            return cls(kind=spec)
        return coerce_options(cls, "residual", spec, "dict(kind='exact', order=1)")

    def predict(self, memory: Memory, time: float) -> Tensor:
        """What to add at a timestep."""
        last = memory.predict(time, self.order)
        return last if self.gain == 1 else last * self.gain


class Memory:
    """The residuals of one site at the last refreshes of the run."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._residuals: list[Tensor] = []

    def keep(self, time: float, residual: Tensor, order: int) -> None:
        """Add the newest; of the older ones as many stay as ``order`` needs."""
        self._times = [*self._times, time][-1 - order :]
        self._residuals = [*self._residuals, residual][-1 - order :]

    def __len__(self) -> int:
        return len(self._times)

    def predict(self, time: float, order: int) -> Tensor:
        """What is expected at a timestep: on the polynomial of this order through the last ones,
        or of a lower order where too few are known."""
        times, residuals = self._times[-1 - order :], self._residuals[-1 - order :]
        if len(times) == 1:
            return residuals[0]
        if len(times) == 2:
            before, after = times
            return torch.lerp(*residuals, (time - before) / (after - before))
        # Lagrange: every residual times the polynomial that is 1 at its time, 0 at the others.
        total = None
        for i, residual in enumerate(residuals):
            others = times[:i] + times[i + 1 :]
            weight = prod((time - other) / (times[i] - other) for other in others)
            total = residual * weight if total is None else total.add_(residual, alpha=weight)
        return total


class Run:
    """One denoising run of a network, from its first step to its last.

    Attributes:
        step (int): number of the present step, 0 = the first; -1 before it. Steps at which the
            network does not run are not counted.
        time (float | None): timestep of the present step.
        plans (dict): (block, kind of site) -> the plan that it keeps (None: nothing to merge).
        unmerged (set): (block, kind of site) that the ratio's schedule leaves alone at present.
        refreshed (dict): name of a block -> the step at which it refreshed last.
        memories (dict): name of a site -> :class:`Memory`.
        kept (dict): of a scope -> what is kept of its output (:mod:`.reuse`).
        left_out (dict): name of a scope -> for how many steps it has not run now.
        last (bool): whether the present step looks like the last: as long a stride again
            would reach timestep 0.
        heat (Tensor | None): (B / 2, h, w), how far the text moved the last step's
            prediction at every place, for methods that watch the output.
        guided (bool | None): whether the halves of the batch are the same picture without and with
            the text; None: not looked at.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next step is the first of a new run."""
        self.step = -1
        self.time: float | None = None
        self.key: Hashable = None
        self.plans: dict[Hashable, Any] = {}
        self.unmerged: set[Hashable] = set()
        self.refreshed: dict[str, int] = {}
        self.memories: dict[str, Memory] = {}
        self.kept: dict[Hashable, Any] = {}
        self.left_out: dict[str, int] = {}
        self.last = False
        self.heat: Tensor | None = None
        self.guided: bool | None = None

    def begin_step(self, time: float | None, key: Hashable) -> None:
        """Start the next step, of the same run as far as can be told.

        A run goes from high timesteps to low ones. A timestep that does not fall, another
        batch, size, dtype or device (``key``), or no timestep at all starts a new run. What cannot
        be told: a run that was stopped between two steps, and one of the same shape that begins
        at a lower timestep; ``handle.reset()`` says so.
        """
        falls = time is not None and self.time is not None and time < self.time
        if not falls or key != self.key:
            self.reset()
        self.step += 1
        self.last = self.time is not None and 2 * time <= self.time
        self.time, self.key = time, key

    def leave_out(self) -> None:
        """The network does not run at this step: for what counts its runs there is none."""
        self.step -= 1


class Lanes:
    """The runs that a network is in the middle of, at most two.

    Some pipelines call their network twice at every step, once without and once with the text.
    The second call at a timestep belongs to a run of its own, whose last step was the second call
    at the timestep before. A second call at the *first* timestep is that only with the same
    picture; with another one it is the next run's, after one that was stopped or had one step.
    """

    MOST = 2

    def __init__(self) -> None:
        self.runs = [Run()]
        self.lane = 0
        self.first: list[Tensor] | None = None

    @property
    def run(self) -> Run:
        """The run that the present forward is a step of."""
        return self.runs[self.lane]

    def begin_step(
        self, time: float | None, key: Hashable, pictures: list[Tensor] | None = None
    ) -> None:
        """As :meth:`Run.begin_step`, of the run whose turn it is; ``pictures`` are what the network
        is given, None where that is not known. Waits for the device once in a run, and only where
        a network is called twice at a step."""
        run = self.run
        again = time is not None and time == run.time and key == run.key
        if again and self.lane == 0 and run.step == 0 and not self.same(pictures):
            self.reset()
        elif again and self.lane + 1 < self.MOST:
            self.lane += 1
            if self.lane == len(self.runs):
                self.runs.append(Run())
        elif again or run.time is None or time is None or time > run.time or key != run.key:
            self.reset()
        else:
            self.lane, self.first = 0, None
        self.run.begin_step(time, key)
        if self.lane == 0 and self.run.step == 0 and pictures is not None:
            # A copy: the caller may go on in the same memory.
            self.first = [picture.detach().clone() for picture in pictures]

    def same(self, pictures: list[Tensor] | None) -> bool:
        """Whether these are the pictures of the run's first step, as far as is known."""
        if pictures is None or self.first is None:
            return True
        return all(torch.equal(one, other) for one, other in zip(pictures, self.first))

    def reset(self) -> None:
        """Forget all runs."""
        self.__init__()


def _is_step(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def check_order(name: str, order: Any) -> None:
    """Refuse an order of extrapolation that there is not."""
    if isinstance(order, bool) or order not in (0, 1, 2):
        raise ToMeError(f"{name}: order={order!r} must be 0, 1 or 2; write order=1")


def coerce_options(cls: type, name: str, spec: Any, example: str) -> Any:
    """Options of a dataclass from a dict or an instance, or an error that knows the keys."""
    if isinstance(spec, cls):
        return spec
    if not isinstance(spec, Mapping):
        raise ToMeError(f"{name}={spec!r} is not valid; write for example {name}={example}")
    check_keys(name, spec, [field.name for field in fields(cls)])
    return cls(**dict(spec))
