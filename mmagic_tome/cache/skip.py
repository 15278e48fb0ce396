# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The calls that may be skipped: what decides, and what runs in their place."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ToMeError
from ..graphs import eager_only
from ..latents import conditioning_of, latents_of, read_timestep
from ..patch import Context, Interceptor, Patch, RunSignals, intercept
from ..runs import Call, Run, RunTracker
from ..timeline import Timeline
from .config import StepCacheConfig
from .extrapolate import placeholder, undefined_like
from .regions import RegionState, RegionStats, next_skips
from .tolerance import REGIONS, Budget, relative_errors

# Calls in a row that begin a run of their own before a warning says so.
_LONE_CALLS = 8


class CacheContext(Context):
    """What is known while a network with step caching is called in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = RunTracker(dict)
        self.time: float | None = 0.0  # timestep of the call
        # Region -> what is kept for the branch that is called; empty where nothing is.
        self.state: dict[str, RegionState] = {}
        self.skipped: set[str] = set()  # regions that are skipped in this call
        self.slope: Tensor | None = None  # with which the network's output is extrapolated
        self.computed: Any = None  # what the network returned, before error feedback
        self.lone_calls = 0  # in a row that began a run
        self.run_skips = 0  # regions skipped in the run so far
        # With a tolerance: the budget of the run that was called last, until its end.
        self.budget: Budget | None = None

    def forget_run(self) -> None:
        self.tracker.clear()
        self.budget = None

    def stop(self) -> None:
        super().stop()
        self.state, self.skipped, self.slope, self.computed = {}, set(), None, None


class CachePatch(Patch):
    """Step caching of one network.

    Args:
        configs: at most one per region, the larger first.
        adapter (ModelAdapter): describes the network.
        model: what the user passed; its scheduler places timesteps on the schedule.
        leader (CachePatch | None): of the network that this one, a ControlNet, is called for.
    """

    context_type = CacheContext

    def __init__(
        self,
        configs: Sequence[StepCacheConfig],
        adapter: Any,
        model: object,
        leader: CachePatch | None = None,
    ) -> None:
        super().__init__()
        self.leader = leader
        #: Patches of the other denoisers of a pipeline, such as the experts of Wan 2.2: where
        #: one takes over from another within a run, they share its budget.
        self.experts: tuple[CachePatch, ...] = ()
        self.configs = tuple(configs)
        self.tolerance = configs[0].tolerance
        self.adapter = adapter
        self._region_configs = {config.region: config for config in configs}
        if self.tolerance is not None and leader is not None:
            self._region_configs = {"network": StepCacheConfig()}
        elif self.tolerance is not None:
            # 'inner' alone: the network is never skipped as a whole.
            wanted = {configs[0].region, "inner"}
            self._region_configs = {
                name: config for name, config in REGIONS.items() if config.region in wanted
            }
        self.regions = {name: RegionStats() for name in self._region_configs}
        self.budget: Budget | None = None  # of the last run, with a tolerance
        self.timeline = Timeline(model, adapter.timestep_scale)

    def place(self, network: nn.Module) -> None:
        """Intercept the calls of the network, and those of its inner modules if these may be
        skipped."""
        intercept(network, NetworkCall(self))
        inside: dict[str, list[nn.Module]] = {}
        for name, config in self._region_configs.items():
            if config.region == "inner":
                modules = self.adapter.inner_modules(network, config.num_outer_blocks)
                if modules:
                    inside[name] = modules
                else:
                    del self.regions[name]
        # The first contains the others.
        every = next(iter(inside.values()), [])
        for index, module in enumerate(every):
            parts = {
                name: module is modules[-1]
                for name, modules in inside.items()
                if any(module is one for one in modules)
            }
            intercept(module, InnerCall(self, index, parts))
            _tell_diffusers(type(module))

    def new_states(self) -> dict[str, RegionState]:
        """What is kept for every region in one guidance branch."""
        configs = {name: self._region_configs[name] for name in self.regions}
        if self.tolerance is not None and self.timeline.amplification[1]:
            configs = {name: one.replace(error_feedback=0.0) for name, one in configs.items()}
        return {name: RegionState(config) for name, config in configs.items()}

    def choose(self, run: Run, time: float) -> Budget:
        """Decide what to skip at a step of a run with a tolerance, for all of its branches."""
        branches = [one.state for one in run.branches.values()]
        known = {
            name: branches[0][name].history.times[-2:]
            for name in self.regions
            if all(name in state and state[name].ready(time) for state in branches)
        }
        budget: Budget = run.state
        budget.decide(run, time, known)
        return budget

    @eager_only(inner=True)
    def output(self, region: str, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        """The output of a region at this step: ``proceed(*args, **kwargs)``, or extrapolated."""
        context = self.context
        if region in context.skipped:
            self.regions[region].skipped += 1
            slope = context.slope if region == "network" else None
            return context.state[region].history.extrapolate(context.time, slope)
        output = proceed(*args, **kwargs)
        if region == "network":
            context.computed = output
        return self.record(region, output)

    def record(self, region: str, output: Any) -> Any:
        """Note a computed output; the output to go on with, see ``error_feedback``."""
        context = self.context
        self.regions[region].computed += 1
        # Outputs change fastest at the end, so there a line through two tells little of the errors
        # between them; and the last step has a weight of its own.
        feedback = not context.tracker.runs[0].last
        return context.state[region].history.record(context.time, output, feedback)


class NetworkCall(RunSignals):
    """The call of the network: which regions to skip, and the whole of it if that is one."""

    skips = True

    @eager_only(inner=True)
    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        patch: CachePatch = self.patch
        context: CacheContext = patch.context
        if context.disabled or context.running:
            return proceed(module, *args, **kwargs)
        if torch.is_grad_enabled():
            patch.warn_once(
                "gradients",
                "step caching skips nothing while gradients are enabled: steps of training are "
                "unrelated. Call the model under torch.no_grad() to generate",
            )
            context.forget_run()
            return proceed(module, *args, **kwargs)
        # All of it, also what comes before the network: an interrupt arrives where the device is
        # waited for, and a context that stays "running" would never skip again.
        try:
            run = self.begin(context, args, kwargs)
            if "network" in context.state:
                output = patch.output("network", proceed, (module, *args), kwargs)
            else:
                output = context.computed = proceed(module, *args, **kwargs)
            computed = context.computed
        except BaseException:
            context.tracker.drop()
            context.budget = None
            raise
        finally:
            context.stop()
        self.finish(context, run, output, computed)
        return output

    @eager_only()
    def begin(self, context: CacheContext, args: tuple, kwargs: dict[str, Any]) -> Run:
        """Find the run of this call and decide which regions to skip."""
        patch: CachePatch = self.patch
        context.start()
        tracker = context.tracker
        if patch.leader is not None:
            tracker.leader = patch.leader.context.tracker
        timestep = patch.adapter.timestep(args, kwargs)
        time, shared = read_timestep(timestep)
        if not shared:
            patch.warn_once(
                "mixed",
                "step caching skips nothing in calls whose images are at different timesteps; "
                "denoise them in step, or call the network for each of them",
            )
            time = None
        remaining, last = patch.timeline(time, tracker.first_time(time), patch.warn_once)
        latents, conditioning = latents_of(args, kwargs), conditioning_of(args, kwargs)
        form = kwargs.get("return_dict")
        run = tracker.begin(Call(time, latents, remaining, last, conditioning, form))
        self.watch(context, run, time)
        if remaining is None and shared:
            patch.warn_once(
                "unknown",
                "step caching skips nothing, since it is not known how much of the run remains at "
                f"timestep {timestep!r}; apply it to the pipeline instead of the network",
            )
        context.time = time
        if time is None:  # no call continues another: nothing needs to be kept
            return run
        context.state = run.branch.state
        if not context.state:
            context.state.update(patch.new_states())
        if patch.tolerance is None:
            context.skipped = next_skips(context.state, time, remaining, run.last)
        elif patch.leader is not None:
            context.skipped = self.along_with_leader(run, latents, time)
        else:
            context.skipped = self.within_tolerance(run, time)
        context.run_skips += len(context.skipped)
        return run

    def within_tolerance(self, run: Run, time: float) -> set[str]:
        """The region to skip at a step: decided at the first of its calls, for all branches."""
        patch: CachePatch = self.patch
        if run.state is None:
            errors = relative_errors(patch.adapter.inner_errors, *patch.timeline.amplification)
            run.state = Budget(patch.tolerance, errors)
            kept = [one.context.budget for one in (patch, *patch.experts)]
            before = [one for one in kept if one is not None and time < one.time]
            if before:
                run.state.go_on(min(before, key=lambda one: one.time))
        budget: Budget = run.state
        if len(run.called) == 1:
            if budget.ahead != time:  # otherwise its ControlNet was called first
                patch.choose(run, time)
            budget.ahead, budget.time = None, time
            for one in (patch, *patch.experts):
                one.budget = budget
            patch.context.budget = None if run.last else budget
        region = budget.skipped[-1]
        patch.context.slope = budget.slope
        # A branch that was not there before computes what it cannot extrapolate.
        return {region} if region and run.branch.state[region].ready(time) else set()

    def along_with_leader(self, run: Run, latents: tuple, time: float) -> set[str]:
        """What a ControlNet skips at a step: everything where the network that reads its output,
        and is called after it, will be skipped."""
        patch: CachePatch = self.patch
        for other in patch.leader.context.tracker.runs:
            if other.input is None or run.previous is None or other.time <= time:
                continue
            # In guess mode a ControlNet gets one of the copies for guidance.
            images = len(run.previous)
            if not torch.equal(other.input[:images], run.previous):
                continue
            latents = tuple(torch.cat([x] * (len(other.input) // images)) for x in latents)
            budget: Budget | None = other.state
            if budget is None:
                break
            if budget.ahead != time:  # the first of its calls at this step
                now = copy.copy(other)
                now.fitted, now.remaining, now.last = other.fit(latents), run.remaining, run.last
                patch.leader.choose(now, time)
                budget.ahead = time
            ready = run.branch.state["network"].ready(time)
            return {"network"} if ready and budget.skipped[-1] == "network" else set()
        return set()

    def watch(self, context: CacheContext, run: Run, time: float | None) -> None:
        """Count from the run's beginning; warn if call after call begins a run of its own."""
        if run.step > 0 or len(run.called) > 1:
            context.lone_calls = 0
            return
        context.run_skips = 0
        # Views of one image begin together.
        context.lone_calls += time is not None and time != context.time
        if context.lone_calls == _LONE_CALLS:
            self.patch.warn_once(
                "unrelated",
                f"step caching skips nothing: {_LONE_CALLS} calls in a row did not follow from the "
                "one before. Rising timesteps (inversion), noise that is added at every step "
                "and unrelated inputs cannot be extrapolated",
            )

    @eager_only()
    def finish(self, context: CacheContext, run: Run, output: Any, computed: Any) -> None:
        """Note the output; after the last step, warn if nothing was skipped in the run."""
        patch: CachePatch = self.patch
        context.tracker.end(output, None if patch.tolerance is None else computed)
        if patch.leader is not None:
            return  # the network that it is called for says so
        if run.last and not context.run_skips and patch.tolerance != 0:
            given, why = "a wider timestep_range", "too few steps lie in timestep_range"
            if patch.tolerance is not None:
                given, why = "a larger tolerance", "the tolerance is too small for its steps"
            patch.warn_once(
                "nothing",
                f"step caching skipped nothing in a run of {run.step + 1} step"
                f"{'' if run.step == 0 else 's'}: {why}, or the scheduler adds noise at every "
                f"step. Use more steps, {given}, or a deterministic scheduler",
            )


class InnerCall(Interceptor):
    """The call of module number ``index`` in the inner region, in running order.

    Args:
        patch: the patch of its network.
        index: the module's number.
        parts: region -> whether the module is its last, whose output is that of the region; the
            larger region first.
    """

    skips = True

    def __init__(self, patch: CachePatch, index: int, parts: Mapping[str, bool]) -> None:
        super().__init__(patch)
        self.index = index
        self.parts = parts

    @eager_only(inner=True)
    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        patch: CachePatch = self.patch
        context: CacheContext = patch.context
        if not context.running or not context.state:
            return proceed(module, *args, **kwargs)
        for region, is_last in self.parts.items():
            if region in context.skipped:
                if is_last:
                    return patch.output(region, proceed, (module, *args), kwargs)
                return undefined_like(context.state[region].placeholders[self.index])
        output = proceed(module, *args, **kwargs)
        for region, is_last in self.parts.items():
            if not is_last:
                # Shapes stay the same within a run.
                known = context.state[region].placeholders
                if self.index not in known:
                    known[self.index] = placeholder(output)
            elif not context.skipped:
                # What follows from an extrapolated region is not an output to extrapolate from.
                output = patch.record(region, output)
        return output


def _tell_diffusers(cls: type) -> None:
    """Let diffusers' own caches, which look up blocks by class, know an intercepted one."""
    helpers = sys.modules.get("diffusers.hooks._helpers")
    blocks = getattr(helpers, "TransformerBlockRegistry", None)
    if blocks is not None:
        with contextlib.suppress(Exception):  # diffusers' own affair, and private there
            blocks._register()
            blocks._registry.setdefault(cls, blocks._registry[cls._intercepted_class])


def inner_modules(config: StepCacheConfig, adapter: Any, network: nn.Module) -> list[nn.Module]:
    """The modules of the inner region, in running order; a :class:`ToMeError` if there are none."""
    modules = adapter.inner_modules(network, config.num_outer_blocks)
    if not modules:
        raise ToMeError(
            f"step cache: {type(network).__name__} has no levels or blocks inside the "
            f"{config.num_outer_blocks} outermost, so region='inner' would skip nothing; write "
            "region='network'"
        )
    return modules
