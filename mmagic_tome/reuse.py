# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Steps at which a part of the network is not run at all: its output is foretold.

What a network says changes smoothly along a denoising run. Where its last outputs D(t1), D(t2)
are known, its output at the next timestep is, to first order, on the line through them::

    D(t) ~ D(t2) + (t - t2) / (t2 - t1) * (D(t2) - D(t1))

which costs nothing. It is the limit of merging with a residual in which every token is merged, at
the scope of a whole network instead of one site. Two scopes:

=========  =======================================================================
network    everything: the call returns the foretold output
deep       everything inside the outermost level(s) of a UNet, or the middle half of the
           blocks of a transformer; the outer part runs, around a foretold inner one
=========  =======================================================================

The first steps of a run (high noise) and the last ones are where outputs bend, so both run in
full. Linear multi-step solvers do the same for differential equations (Adams and Bashforth);
features of inner levels are reused, as they were at the last step, in arXiv 2312.00858.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import ToMeError
from .graphs import Outside
from .models import ModelAdapter
from .temporal import Memory, Run, check_order, coerce_options

SCOPES = ("network", "deep")


@dataclass(frozen=True)
class Scope:
    """How often a part of the network runs.

    Args:
        steps (int): it runs at every this many steps at least; for ``deep`` of those
            at which the network runs. 1 (default): always.
        between (tuple of float): noise levels between which it may be left out, as (low, high),
            1 = pure noise. Default (0, 0.95). The last step of a run is never left out.
        order (int): 0: its last output again; 1 (default): on the line through the last two;
            2: on the parabola through the last three.
        repay (float): share in [0, 1] of what was foretold wrongly that is made good at the next
            run: the outputs there say what the left out ones should have been (on the line
            between its neighbours), and the difference is added. Default 0.

    Raises:
        ToMeError: wrong type or value.
    """

    steps: int = 1
    between: Sequence[float] = (0.0, 0.95)
    order: int = 1
    repay: float = 0.0

    def __post_init__(self) -> None:
        steps = self.steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ToMeError(
                f"reuse: steps={steps!r} must be an integer of at least 1; write steps=2 to run "
                "every second step"
            )
        check_order("reuse", self.order)
        if not _is_share(self.repay):
            raise ToMeError(
                f"reuse: repay={self.repay!r} must be a number in [0, 1]; write repay=0.5"
            )
        pair = self.between
        fine = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not fine or not all(map(_is_share, pair)) or not pair[0] < pair[1]:
            raise ToMeError(
                f"reuse: between={pair!r} must be two noise levels (low, high) in [0, 1]; write "
                "between=(0.1, 0.75)"
            )
        object.__setattr__(self, "between", (float(pair[0]), float(pair[1])))

    @classmethod
    def coerce(cls, spec: Any) -> Scope:
        """From None, a number of steps, a dict or a Scope."""
        if spec is None:
            return cls()
        if isinstance(spec, int) and not isinstance(spec, bool):
            return cls(steps=spec)
        return coerce_options(cls, "reuse", spec, "dict(network=dict(steps=2))")


@dataclass(frozen=True)
class Reuse:
    """Which parts of a network run how often.

    Args:
        network (int | dict | None): a :class:`Scope` of the whole network.
        deep (int | dict | None): one of the network's inner part, inside the ``outer`` outermost
            levels of a UNet.
        outer (int): levels outside of ``deep``; of a transformer, quarters of its blocks at each
            end. Default 1.

    Raises:
        ToMeError: wrong type or value, or nothing that is left out.
    """

    network: Any = None
    deep: Any = None
    outer: int = 1

    def __post_init__(self) -> None:
        for name in SCOPES:
            object.__setattr__(self, name, Scope.coerce(getattr(self, name)))
        outer = self.outer
        if isinstance(outer, bool) or not isinstance(outer, int) or outer < 1:
            raise ToMeError(f"reuse: outer={outer!r} must be an integer of at least 1; write 1")
        if not self.scopes:
            raise ToMeError(
                "reuse: every part runs at every step; write for example reuse=dict(network=2)"
            )

    @classmethod
    def coerce(cls, spec: Any) -> Reuse | None:
        """From None, a number of steps (of the network), a dict or a Reuse."""
        if spec is None:
            return None
        if isinstance(spec, int) and not isinstance(spec, bool):
            return cls(network=spec)
        return coerce_options(cls, "reuse", spec, "dict(network=2, deep=2)")

    @property
    def scopes(self) -> dict[str, Scope]:
        """Those that are left out at times, by name."""
        scopes = {name: getattr(self, name) for name in SCOPES}
        return {name: scope for name, scope in scopes.items() if scope.steps > 1}

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, inverse of :meth:`coerce`."""
        plain: dict[str, Any] = {
            name: {f.name: getattr(scope, f.name) for f in fields(scope)}
            for name, scope in self.scopes.items()
        }
        for scope in plain.values():
            scope["between"] = list(scope["between"])
        return plain if self.outer == 1 else {**plain, "outer": self.outer}


def _is_share(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x <= 1


def foretold(states: Sequence[ScopeState], run: Run, noise: float | None) -> frozenset[str]:
    """The scopes to leave out at the present step of a run; noted there.

    Args:
        states (list of ScopeState): the scopes, the outer one first.
        run (Run): the run; what it keeps decides as well: nothing is foretold from too few
            outputs, and never the last step.
        noise (float | None): noise level of the step; None where it is not known, and all runs.
    """
    chosen: list[str] = []
    for state in states:
        name, options = state.name, state.options
        low, high = options.between
        kept = run.kept.get((name, len(state.modules) - 1), ())
        out = (
            noise is not None
            and low < noise < high
            and not run.last
            and len(kept) > options.order
            and run.left_out.get(name, 0) < options.steps - 1
        )
        run.left_out[name] = run.left_out.get(name, 0) + 1 if out else 0
        if out:
            chosen.append(name)
            if name == "network":
                break  # the rest is inside it
    return frozenset(chosen)


class ScopeState:
    """One scope of one network and what was seen there."""

    def __init__(self, name: str, options: Scope, modules: list[nn.Module]) -> None:
        self.name = name
        self.options = options
        self.modules = modules
        self.runs = 0
        self.reused = 0


class Kept:
    """What one run keeps of what one module of a scope returned, in whatever structure.

    Every tensor in it is foretold on its own.
    """

    def __init__(self) -> None:
        self.memories: list[Memory] = []
        self.shapes: Any = None
        # (timestep, what was foretold), since the last run; where it is to be made good.
        self.unpaid: list[tuple[float, list[Tensor]]] = []

    def __len__(self) -> int:
        """Outputs that are remembered."""
        return len(self.memories[0]) if self.memories else 0

    @Outside()
    def keep(self, time: float, output: Any, options: Scope) -> Any:
        """Remember the numbers of an output; the output to go on with, see :class:`Scope`."""
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.memories):
            self.memories, self.unpaid = [Memory() for _ in tensors], []
        for memory, tensor in zip(self.memories, tensors):
            # A copy: whoever gets the output may change it in place.
            memory.keep(time, tensor.detach().clone(), max(options.order, options.repay > 0))
        self.keep_shapes(output)
        unpaid, self.unpaid = self.unpaid, []
        if not unpaid:
            return output
        for left_out, guesses in unpaid:
            tensors = [
                tensor + options.repay * (memory.predict(left_out, 1) - guess)
                for tensor, memory, guess in zip(tensors, self.memories, guesses)
            ]
        paid = iter(tensors)
        leaves = [next(paid) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(leaves, structure)

    @Outside()
    def keep_shapes(self, output: Any) -> None:
        """Remember an output without its numbers: one number that is repeated everywhere."""
        self.shapes = tree_map(
            lambda x: x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else x, output
        )

    @Outside()
    def foretell(self, time: float, options: Scope) -> Any:
        """The output at a timestep, in the structure of the last one."""
        leaves, structure = tree_flatten(self.shapes)
        guesses = [memory.predict(time, options.order) for memory in self.memories]
        if options.repay:
            self.unpaid.append((time, [guess.clone() for guess in guesses]))
        found = iter(guesses)
        leaves = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(leaves, structure)


class ScopeForward:
    """Takes the place of a module's ``forward``, which a hook could not leave out.

    Args:
        state (MergeState): of the network.
        scope (ScopeState): the part that the module belongs to.
        index (int): number of the module in ``scope.modules``. The last one gives the scope's
            output; where the scope is left out, the others give placeholders of the right shape.
    """

    def __init__(self, state: Any, scope: ScopeState, index: int) -> None:
        self.state, self.scope = state, scope
        self.module = scope.modules[index]
        self.key = (scope.name, index)
        self.last = index == len(scope.modules) - 1
        self.place()

    def place(self) -> None:
        """Become the module's forward."""
        # Somebody else's stand-in for the method (offloading has one), or None.
        self.before = self.module.__dict__.get("forward")
        self.module.forward = self

    def remove(self) -> None:
        """Give the module its forward back."""
        if self.module.__dict__.get("forward") is not self:
            return  # wrapped by somebody in the meantime; from now on this one only passes on
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    @Outside(inner=True)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, unless it is left out at this step."""
        forward = self.state.forward
        name = self.scope.name
        if name in forward.foretold:
            kept = forward.run.kept[self.key]
            if not self.last:
                return kept.shapes
            self.scope.reused += 1
            return kept.foretell(forward.run.time, self.scope.options)
        if self.before is None:
            output = type(self.module).forward(self.module, *args, **kwargs)
        else:
            output = self.before(*args, **kwargs)
        if self.last:
            self.scope.runs += 1
        if name in forward.remembered:
            kept = forward.run.kept.setdefault(self.key, Kept())
            if self.last:
                output = kept.keep(forward.run.time, output, self.scope.options)
            else:
                kept.keep_shapes(output)
        return output


def scope_states(reuse: Reuse, host: ModelAdapter, network: nn.Module) -> list[ScopeState]:
    """The modules of every scope that is left out at times.

    Raises:
        ToMeError: a network without an inner part.
    """
    states = []
    for name, scope in reuse.scopes.items():
        modules = [network] if name == "network" else host.inner_modules(network, reuse.outer)
        if not modules:
            raise ToMeError(
                f"reuse: {type(network).__name__} has no levels or blocks inside the "
                f"{reuse.outer} outermost, so 'deep' has nothing to leave out; write "
                "reuse=dict(network=2)"
            )
        states.append(ScopeState(name, scope, modules))
    return states
