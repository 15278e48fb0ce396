# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""From candidate to candidate until a goal is met. Knows of no model: time and error are functions.

Three parts:

1. Greedy: from the dense model, always the move that saves most time per error that it adds. What
   a move was worth last time is taken for an upper bound of what it is worth now, so that mostly
   one or two have to be tried again (lazy greedy, Minoux 1978).
2. Starts that are known already, the presets, are tried as well.
3. Polish: from the best that meets the goal to its neighbours that meet it too, as long as one is
   better.

The same answers of ``time`` and ``judge`` give the same search, also where those of ``judge`` come
from a file: the budget is counted in the seconds that trials took when they were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

from ..errors import ToMeError
from .space import Candidate, Space

# Predicted speed-ups are that much too good at times.
MARGIN = 1.02
# What is faster by less than this cannot be asked for.
LEAST = 1.01
# Squared error, in levels of 255, below which one is as good as another.
TINY = 1e-3
# Neighbours of the best that are tried before it counts as the best around.
MOST_NEIGHBOURS = 12


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried.

    Args:
        candidate: which.
        mse: mean squared error against the dense pictures, in levels of 255.
        speedup: predicted.
    """

    candidate: Candidate
    mse: float
    speedup: float

    @property
    def psnr(self) -> float:
        """In dB of the peak 255; infinite for the same pictures."""
        return psnr_of(self.mse)


def psnr_of(mse: float) -> float:
    """PSNR in dB of a mean squared error in levels of 255."""
    return math.inf if mse <= 0 else 10 * math.log10(255**2 / mse)


@dataclass(frozen=True)
class Goal:
    """What is asked for: exactly one of the two.

    Args:
        speedup: at least this many times faster than dense, with the least error.
        psnr: at least this many dB against the dense pictures, as fast as possible.
    """

    speedup: float | None = None
    psnr: float | None = None

    def met(self, trial: Trial) -> bool:
        """Whether a trial meets it. Dense meets none: it is what is to be left."""
        if self.speedup is not None:
            return trial.speedup >= self.speedup
        return trial.psnr >= self.psnr and trial.speedup > 1

    def rank(self, trial: Trial) -> tuple[float, float]:
        """Of those that meet it, the one with the lowest is the best."""
        if self.speedup is not None:
            return trial.mse, -trial.speedup
        return -trial.speedup, trial.mse

    def text(self) -> str:
        """In words."""
        return f"{self.speedup:g}x" if self.speedup is not None else f"{self.psnr:g} dB"


class _Spent(Exception):
    """The budget is used up."""


class Search:
    """One search; :meth:`run` again, with a higher goal, goes on where it was.

    Args:
        space: what may be done.
        speedup: candidate -> predicted speed-up over dense.
        judge: candidate -> (mean squared error, seconds that the trial took).
        budget: seconds of trials.
        starts: candidates to try at any rate, such as the presets.
    """

    def __init__(
        self,
        space: Space,
        speedup: Callable[[Candidate], float],
        judge: Callable[[Candidate], tuple[float, float]],
        budget: float,
        starts: Iterable[Candidate] = (),
    ) -> None:
        self.space, self.speedup, self.judge = space, speedup, judge
        self.left = budget
        self.starts = [start for start in starts if space.holds(start)]
        self.trials: dict[Candidate, Trial] = {}
        self.path = [Trial(space.dense, 0.0, 1.0)]
        self._worth: dict[str, float] = {}
        # Moves that led beyond a bound on the error, which has only grown since.
        self._closed: set[str] = set()

    def run(self, goal: Goal) -> Trial:
        """The best candidate that meets a goal.

        Raises:
            ToMeError: none does; says the best there is.
        """
        self.check_reachable(goal)
        try:
            for start in self.starts:
                self._try(start)
            self._greedy(goal)
            if self._best(goal) is None:
                self._leap(goal)
            self._polish(goal)
        except _Spent:
            if not goal.met(self.path[-1]):
                self._leap(goal)
        best = self._best(goal)
        if best is None:
            raise ToMeError(self._unreached(goal))
        return best

    # --- one trial --------------------------------------------------------------------------------

    def _try(self, candidate: Candidate) -> Trial:
        if candidate not in self.trials:
            if self.left <= 0:
                raise _Spent
            self._judge(candidate)
        return self.trials[candidate]

    def _judge(self, candidate: Candidate) -> None:
        mse, seconds = self.judge(candidate)
        self.left -= seconds
        self.trials[candidate] = Trial(candidate, mse, self.speedup(candidate))

    def _best(self, goal: Goal) -> Trial | None:
        met = [trial for trial in self.trials.values() if goal.met(trial)]
        return min(met, key=goal.rank, default=None)

    # --- greedy -----------------------------------------------------------------------------------

    def _moves(self, candidate: Candidate) -> dict[str, Candidate]:
        """Name of a move -> the nearest candidate on it that is faster."""
        now = self.speedup(candidate)
        moves = {}
        for name, chain_ in self.space.faster(candidate):
            for one in chain_:
                if self.speedup(one) > now * (1 + 1e-9):
                    moves[name] = one
                    break
        return moves

    def _greedy(self, goal: Goal) -> None:
        # A higher goal than the last: back to where it was still met.
        while goal.psnr is not None and self.path[-1].psnr < goal.psnr:
            self.path.pop()
        while not (goal.speedup is not None and goal.met(self.path[-1])):
            step = self._step(goal, self.path[-1])
            if step is None:
                return
            self.path.append(step)

    def _step(self, goal: Goal, now: Trial) -> Trial | None:
        """The move that saves most per error; None if there is none."""
        moves = self._moves(now.candidate)
        fresh: dict[str, Trial] = {}
        while True:
            names = [name for name in moves if name not in self._closed]
            if not names:
                return None
            top = max(names, key=lambda name: self._worth.get(name, math.inf))
            if top in fresh:
                return fresh[top]
            trial = self._try(moves[top])
            fresh[top] = trial
            if goal.psnr is not None and not goal.met(trial):
                self._closed.add(top)
                continue
            speedup = trial.speedup
            if goal.speedup is not None:
                speedup = min(speedup, goal.speedup)  # what is beyond it is worth nothing
            saved = 1 / now.speedup - 1 / speedup
            self._worth[top] = saved / max(trial.mse - now.mse, TINY)

    def _leap(self, goal: Goal) -> None:
        """The way ended before a speed-up: go on by what moves were worth, try where that leads."""
        if goal.speedup is None:
            return
        candidate = self.path[-1].candidate
        while self.speedup(candidate) < goal.speedup:
            moves = self._moves(candidate)
            if not moves:  # a dead end; what is faster lies elsewhere
                candidate = max(self.space.fastest(), key=self.speedup)
                break
            candidate = moves[max(moves, key=lambda name: self._worth.get(name, 0.0))]
        if candidate not in self.trials:
            self._judge(candidate)

    # --- polish -----------------------------------------------------------------------------------

    def _polish(self, goal: Goal) -> None:
        while True:
            best = self._best(goal)
            if best is None:
                return
            for candidate in self._neighbours(goal, best):
                if goal.met(trial := self._try(candidate)) and goal.rank(trial) < goal.rank(best):
                    break
            else:
                return

    def _neighbours(self, goal: Goal, best: Trial) -> list[Candidate]:
        """Those that can be better as far as time tells: one thing less, or one less, one more."""
        slower = list(self.space.slower(best.candidate))
        swapped = chain.from_iterable(self._moves(one).values() for one in slower)
        elsewhere = self.space.elsewhere(best.candidate)
        around = dict.fromkeys(
            [*slower, *swapped, *elsewhere, *self._moves(best.candidate).values()]
        )
        least = goal.speedup if goal.speedup is not None else best.speedup * (1 + 1e-9)
        close = [one for one in around if not one.dense and self.speedup(one) >= least]
        # What is barely fast enough probably changes least.
        close = sorted(close, key=self.speedup)[:MOST_NEIGHBOURS]
        return [*(self.space.alike(best.candidate) if goal.speedup is not None else ()), *close]

    # --- what to say ------------------------------------------------------------------------------

    @property
    def top(self) -> float:
        """The highest speed-up that the space holds, as predicted."""
        return max(self.speedup(one) for one in self.space.fastest())

    def check_reachable(self, goal: Goal) -> None:
        """Fail for a goal that nothing in the space can meet, whatever its error."""
        top = self.top
        if top <= LEAST:
            raise ToMeError(
                "nothing here makes this model faster on this machine: no region can be skipped, "
                "and merging saves no time at this size; a larger --size or more --steps may"
            )
        if goal.speedup is not None and top < goal.speedup:
            raise ToMeError(
                f"--speedup {goal.speedup:.4g} cannot be reached: skipping all that can be "
                f"skipped here gives {math.floor(100 * top) / 100:.2f}x as predicted from measured "
                f"costs; "
                f"write --speedup {math.floor(100 * top) / 100:g} or less, or fewer --steps"
            )

    def _unreached(self, goal: Goal) -> str:
        if not self.trials:
            return "--budget is too small to try anything; write --budget 5"
        if goal.psnr is None:
            best = max(self.trials.values(), key=lambda trial: trial.speedup)
            return (
                f"no candidate of {goal.text()} was found; the fastest tried has "
                f"{best.speedup:.2f}x; raise --budget, what was tried is kept"
            )
        faster = [trial for trial in self.trials.values() if trial.speedup > 1]
        if not faster:
            return "nothing that was tried saves any time; raise --budget, what was tried is kept"
        best = max(faster, key=lambda trial: trial.psnr)
        return (
            f"--psnr {goal.psnr:g} cannot be reached: the best that saves any time has "
            f"{best.psnr:.1f} dB at {best.speedup:.2f}x; write --psnr {math.floor(best.psnr)} or "
            "less"
        )


def front(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that no other beats in both speed and error, the slowest first."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (-trial.speedup, trial.mse)):
        if not best or trial.mse < best[-1].mse:
            best.append(trial)
    return best[::-1]
