# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Denoising runs: where one begins, whether a call continues it, where it ends.

What a pipeline says is believed: diffusers' pipelines end a run (``_reset_stateful_cache``) and
name guidance branches (``cache_context``). Otherwise a call continues a run only if its input
follows from that run: a sampler computes the next latent as a linear combination of the last
latents and outputs, so a least-squares fit leaves a small residual
(``docs/project/architecture.md``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .fits import Fit, fit_input, held_elements
from .latents import count_copies, cropped, sampled, tensors_of

#: Largest relative residual of a call that continues a run. Deterministic samplers leave at most
#: 0.03, the inputs of other images at least 0.68; ancestral samplers, which add noise, 0.1 to 1.
MAX_RESIDUAL = 0.5
# A run that has fitted well is held to it: this many times its own worst residual, at least this.
_TOLERANCE, _SMALLEST = 3.0, 0.05
# A second call at one timestep, as PNDM makes it, follows exactly: so near are the inputs of two
# images with the same seed.
_AT_ONE_TIMESTEP = 0.01
# A residual above this may be that of inpainting, and must fall to this fraction of it where what
# is put back is left out.
_INEXACT, _BETTER = 0.003, 0.2
# It is looked for at so many steps of a run.
_SEARCHES = 4
# Of two runs that a call may continue, the better one must fit this many times as well.
_CLEARLY = 2.0
# Share of the new input that a guidance branch must explain to be part of a run.
_NEGLIGIBLE = 1e-4
# Runs that one thread may interleave: views of one image, and runs at other timesteps.
_MAX_RUNS, _MAX_OTHERS = 64, 3
# Guidance branches of one step.
_MAX_BRANCHES = 16


@dataclass(frozen=True)
class Call:
    """One call of a network, as far as runs are concerned."""

    time: float | None  # its timestep, which falls along a run; None if unknown
    latents: tuple[Tensor, ...]  # the tensors to denoise; empty if unknown
    # Share of the run's schedule that remains, 1 at its start, 0 at its end; None if unknown.
    remaining: float | None = None
    last: bool | None = None  # whether it is the last step; None if the schedule is unknown
    conditioning: Tensor | None = None  # what tells branches of guidance apart, such as the text
    form: Hashable = None  # what else must stay the same, such as the form of the output

    @property
    def key(self) -> Hashable:
        """What stays the same within a run; None if nothing is known."""
        if self.time is None or not self.latents:
            return None
        shapes = tuple((tuple(x.shape), x.dtype, x.device) for x in self.latents)
        return self.form, shapes


@dataclass(eq=False)
class Branch:
    """One call per step of a run: the whole batch, or one of the halves of guidance."""

    state: Any  # what the technique keeps for it
    conditioning: Tensor | None = None  # (B, n), a sample of what its last call was given
    # (B, n) samples of its last two outputs, the newest last.
    outputs: list[Tensor] = field(default_factory=list)
    # Timesteps and samples of its last three outputs that were not extrapolated.
    times: list[float] = field(default_factory=list)
    computed: list[Tensor] = field(default_factory=list)

    def keep(self, time: float, output: Tensor) -> None:
        """Keep the sample of a computed output for :meth:`rates`."""
        if self.times[-1:] == [time]:  # a second evaluation at one timestep
            self.times, self.computed = self.times[:-1], self.computed[:-1]
        self.times = [*self.times[-2:], time]
        self.computed = [*self.computed[-2:], output]

    def rates(self) -> list[Tensor]:
        """(B, n) changes of the computed outputs per unit of the timestep, the newest last."""
        pairs = zip(self.times, self.times[1:], self.computed, self.computed[1:])
        return [(after - before) / (t1 - t0) for t0, t1, before, after in pairs]


@dataclass(eq=False)
class Run:
    """One denoising run."""

    key: Hashable  # see Call
    first_time: float | None = None  # timestep of its first step,
    time: float | None = None  # and of its present one
    step: int = 0  # number of the present step
    remaining: float | None = None  # see Call
    last: bool = False  # whether the present step is the last, as far as can be told
    # Into how many equal parts the batch falls, 2 with classifier-free guidance; None at first.
    copies: int | None = None
    # Name, or number within the step -> branch; and those called at the present step, in order.
    branches: dict[Hashable, Branch] = field(default_factory=dict)
    called: list[Hashable] = field(default_factory=list)
    # Number of the tracker's call at which it was called last, and at which this step began.
    tick: int = 0
    step_tick: int = 0
    input: Tensor | None = None  # (B, n), a sample of this step's input,
    previous: Tensor | None = None  # and of the last step's
    shapes: list[Tensor] | None = None  # of stride 0, with the shapes that inputs are cropped to
    # (B, n), 0 where the pipeline puts latents back at every step, as inpainting does, 1 elsewhere;
    # None if it does not, or was not looked for yet.
    free: Tensor | None = None
    searched: int = 0  # steps at which it was looked for
    worst: float = 0.0  # the largest residual so far
    fitted: Fit | None = None  # how the present step's input follows from the last step
    state: Any = None  # what the technique keeps for the run

    @property
    def branch(self) -> Branch:
        """That of the call under way."""
        return self.branches[self.called[-1]]

    @property
    def bound(self) -> float:
        """Largest residual of a call that continues this run."""
        known = self.step > 0 and any(branch.outputs for branch in self.branches.values())
        return min(MAX_RESIDUAL, max(_SMALLEST, _TOLERANCE * self.worst)) if known else MAX_RESIDUAL

    def sample(self, latents: Sequence[Tensor]) -> Tensor:
        """(B, n) float32: some elements of every image of an input, without the channels that the
        network does not predict (the mask of inpainting)."""
        shapes = self.shapes or [None] * len(latents)
        return sampled([cropped(x, shape) for x, shape in zip(latents, shapes)])

    def same_input(self, latents: Sequence[Tensor]) -> bool:
        """Whether the call at the present step had this input."""
        return self.input is not None and torch.equal(self.input, self.sample(latents))

    def fit(self, latents: Sequence[Tensor]) -> Fit:
        """How well an input follows from this run."""
        x = self.sample(latents)
        fit = self._fit(x)
        inexact = _INEXACT < fit.residual <= self.bound
        untried = self.free is None and self.searched < _SEARCHES
        if inexact and untried and self.times and self.previous is not None:
            self.searched += 1
            # Rounding of half precision hides what is put back, and leaves a residual.
            rounding = torch.finfo(latents[0].dtype).eps
            held = held_elements(x, self.input, self.previous, max(1e-4, 4 * rounding))
            self.free = (~held).to(x)
            better = self._fit(x)
            if better.residual < (_BETTER if rounding < 1e-5 else 0.5) * fit.residual:
                return better
            self.free = None
        return fit

    def _fit(self, x: Tensor) -> Fit:
        """The fit of a sample of an input, without what is put back at every step."""

        def part(y: Tensor | None) -> Tensor | None:
            return y if y is None or self.free is None else y * self.free

        outputs = {
            name: [part(y) for y in branch.outputs[::-1]] for name, branch in self.branches.items()
        }
        rates = [map(part, branch.rates()) for branch in self.branches.values() if self.times]
        return fit_input(
            part(x), part(self.input), part(self.previous), outputs, list(zip(*rates)),
            self.copies or 1, whole=x,
        )  # fmt: skip

    @property
    def times(self) -> list[float]:
        """Timesteps of the last computed outputs that are kept; empty where branches differ."""
        times = [branch.times for branch in self.branches.values()]
        return times[0] if times and all(one == times[0] for one in times) else []

    def next_step(self, fit: Fit) -> Run | None:
        """Go on to the next step; return what was called at the last one with the same input and
        has no part in the next: another image with the same seed, now a run of its own."""
        named = any(isinstance(key, str) for key in self.called)
        kept = [key for key in self.called if named or fit.shares.get(key, 1.0) >= _NEGLIGIBLE]
        kept = kept or self.called
        other = None
        left = [self.branches[key] for key in self.called if key not in kept]
        if left:
            other = copy.copy(self)
            other.state = copy.deepcopy(self.state)
            other.branches = dict(enumerate(left))
            other.called = list(other.branches)
        # A branch that was not called at the last step has ended.
        branches = [self.branches[key] for key in kept]
        self.branches = dict(zip(kept if named else range(len(branches)), branches))
        self.step += 1
        self.worst = max(fit.residual, self.worst)
        self.fitted = fit
        self.called = []
        self.previous, self.input = self.input, None
        return other

    def remember(self, latents: Sequence[Tensor], output: Any, computed: Any = None) -> None:
        """Note input and output of the call that ended; arguments as of :meth:`RunTracker.end`."""
        outputs = tensors_of(output)
        if [y.dim() for y in outputs] != [x.dim() for x in latents]:
            outputs = []  # a ControlNet: inputs are compared with inputs alone
        if self.shapes is None:
            self.shapes = [x.new_empty(()).expand(x.shape) for x in outputs or latents]
        if self.input is None:
            self.input = self.sample(latents)
        # Two prompts with one seed begin with equal inputs, as copies for guidance do.
        if self.copies is None or (self.step == 1 and len(self.called) == 1):
            self.copies = count_copies(self.input)
        if outputs:
            newest = self._sample_like(latents, outputs)
            if newest.shape == self.input.shape:
                self.branch.outputs = [*self.branch.outputs[-1:], newest]
                if computed is output:  # without error feedback
                    self.branch.keep(self.time, newest)
                elif computed is not None:
                    found = tensors_of(computed)
                    self.branch.keep(self.time, self._sample_like(latents, found))

    @staticmethod
    def _sample_like(latents: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """A sample of outputs, cropped as their inputs are."""
        return sampled([cropped(y, x) for x, y in zip(latents, outputs)])


class RunTracker:
    """The runs of one thread; ``new_state()`` is what a technique keeps for every branch."""

    def __init__(self, new_state: Callable[[], Any]) -> None:
        self.new_state = new_state
        # That of the network that this one (a ControlNet) is called for with the same latents: its
        # outputs are what the next latent follows from.
        self.leader: RunTracker | None = None
        # What the pipeline calls the guidance branch of the next call.
        self.branch_name: str | None = None
        self.runs: list[Run] = []  # the newest first
        self._tick = 0
        self._latents: tuple[Tensor, ...] = ()

    def first_time(self, time: float | None) -> float | None:
        """First timestep of the run that a call at ``time`` seems to continue."""
        for run in self.runs[:1]:
            if None not in (time, run.time) and time <= run.time:
                return run.first_time
        return time

    def clear(self) -> None:
        """Forget all runs."""
        self.runs = []
        self._latents = ()

    def begin(self, call: Call) -> Run:
        """Return the run that a call belongs to: one that it continues, or a new one."""
        self._tick += 1
        run = self._joined(call) or self._continued(call) or self._started(call)
        if call.last is not None:
            run.last = call.last
        elif run.time != call.time:
            # As large a stride again would reach the end.
            before, now = run.remaining, call.remaining
            run.last = None not in (before, now) and 2 * now <= before
        run.time, run.remaining, run.tick = call.time, call.remaining, self._tick
        self.runs = [run, *(one for one in self.runs if one is not run)]
        self._latents = call.latents
        return run

    def end(self, output: Any, computed: Any = None) -> None:
        """Note what the call under way returned; after a last step nothing is kept.

        Args:
            output: what the caller got.
            computed: what the network computed, to be kept for :attr:`Fit.rates`; None if nothing.
        """
        run = self.runs[0]
        if self._latents:
            run.remember(self._latents, output, computed)
        self._latents = ()
        if run.last:
            run.branch.state, run.branch.computed, run.branch.times = self.new_state(), [], []
            run.fitted = None

    def drop(self) -> None:
        """Forget the run whose call failed."""
        self.runs = self.runs[1:]
        self._latents = ()

    def _joined(self, call: Call) -> Run | None:
        """A run at whose present step this is one more call: the other half of guidance."""
        for run in self._mates(call):
            fits = call.time == run.time and self.branch_name not in run.called
            fits = fits and len(run.called) < _MAX_BRANCHES and run.same_input(call.latents)
            if fits and not self._repeats(run, call):
                self._enter(run, call)
                return run
        return None

    def _enter(self, run: Run, call: Call) -> None:
        """Find the branch of a run that a call belongs to: by the pipeline's name for it, by what
        it is conditioned on, by its number within the step."""
        given = None if call.conditioning is None else sampled([call.conditioning])
        name = self.branch_name
        if name is None:
            name = len(run.called)
            free = [key for key in run.branches if key not in run.called]
            # One branch alone may change what it is conditioned on, as prompt editing does.
            if len(run.branches) > 1 and given is not None:
                free = [key for key in free if _equal(run.branches[key].conditioning, given)]
            if name not in free:
                numbers = [key for key in run.branches if isinstance(key, int)]
                name = free[0] if free else 1 + max(numbers, default=-1)
        branch = run.branches.setdefault(name, Branch(self.new_state()))
        branch.conditioning = given
        run.called.append(name)

    def _repeats(self, run: Run, call: Call) -> bool:
        """Whether a later run reaches this step now: a repeated seed repeats its inputs."""
        for one in self._mates(call):
            if one.tick > run.tick and one.time > call.time and one.input is not None:
                fit, bound = self._fit(one, call.latents)
                if fit.residual <= bound:
                    return True
        return False

    def _continued(self, call: Call) -> Run | None:
        """A run whose next step this is."""
        candidates = []
        for run in self._mates(call):
            if run.input is None or call.time > run.time:
                continue
            fit, bound = self._fit(run, call.latents)
            if call.time == run.time:
                if run.same_input(call.latents):
                    continue  # the same call again begins a run again
                bound = min(bound, _AT_ONE_TIMESTEP)
            if fit.residual <= bound:
                candidates.append((fit, run))
        candidates.sort(key=lambda one: one[0].residual)
        if not candidates:
            return None
        fit, run = candidates[0]
        if len(candidates) > 1 and _CLEARLY * fit.residual > candidates[1][0].residual:
            return None
        # Whoever was not called during this run's whole last step is not going on.
        self.runs = [one for one in self.runs if one.tick >= run.step_tick]
        other = run.next_step(fit)
        if other is not None:
            self.runs.append(other)
        self._enter(run, call)
        run.step_tick = self._tick
        return run

    def _fit(self, run: Run, latents: Sequence[Tensor]) -> tuple[Fit, float]:
        """Fit and bound of a call that may continue a run."""
        for other in self.leader.runs if self.leader is not None else ():
            if _equal(other.input, run.input):
                return Fit(other.fit(latents).residual), other.bound
        return run.fit(latents), run.bound

    def _started(self, call: Call) -> Run:
        run = Run(call.key, call.time)
        self._enter(run, call)
        run.step_tick = self._tick
        # Views of one image start at the same timestep; of anything else only a few are kept.
        # Nothing continues a run of which nothing is known.
        known = [one for one in self.runs if one.key is not None]
        for one in [one for one in known if one.time != call.time][_MAX_OTHERS:]:
            known.remove(one)
        self.runs = known[: _MAX_RUNS - 1]
        return run

    def _mates(self, call: Call) -> list[Run]:
        key = call.key
        return [] if key is None else [run for run in self.runs if run.key == key]


def _equal(x: Tensor | None, y: Tensor) -> bool:
    return x is not None and x.shape == y.shape and torch.equal(x, y)
