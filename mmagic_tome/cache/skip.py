# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The calls that may be skipped: what decides, and what runs in their place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ToMeError
from ..graphs import eager_only
from ..latents import conditioning_of, latents_of, read_timestep
from ..patch import Context, Interceptor, Patch, intercept
from ..runs import Call, Run, RunTracker
from ..timeline import Timeline, in_range
from .config import StepCacheConfig
from .extrapolate import OutputHistory, Placeholder

# Calls in a row that begin a run of their own before a warning says so.
_LONE_CALLS = 8


class Region:
    """One region of one network, and its statistics.

    Attributes:
        config (StepCacheConfig): when it is skipped.
        computed, skipped (int): calls at which it was computed, and at which it was skipped.
    """

    def __init__(self, config: StepCacheConfig) -> None:
        self.config = config
        self.computed = 0
        self.skipped = 0


class SkipRule:
    """Whether to skip a region at each step of a run.

    Args:
        config (StepCacheConfig): of the region.
    """

    def __init__(self, config: StepCacheConfig) -> None:
        self.config = config
        self.in_a_row = 0

    def __call__(self, remaining: float | None, last: bool, known: int) -> bool:
        """Decide for the next step.

        Args:
            remaining: share of the run that remains; None if unknown.
            last: whether it is the run's last step.
            known: how many outputs there are to extrapolate from.
        """
        skip = (
            remaining is not None
            and in_range(remaining, self.config.timestep_range)
            and not last
            and known > self.config.order
            and self.in_a_row < self.config.interval - 1
        )
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip


def skips_of_run(configs: Sequence[StepCacheConfig], num_steps: int) -> list[set[str]]:
    """The regions that are skipped at each step of a run, without running it.

    Args:
        configs: step caches, the larger region first.
        num_steps: steps of the scheduler.
    """
    rules = {config.region: SkipRule(config) for config in configs}
    known = dict.fromkeys(rules, 0)
    steps = []
    for step in range(num_steps):
        remaining = (num_steps - 1 - step) / num_steps
        skipped: set[str] = set()
        for region, rule in rules.items():
            if rule(remaining, step == num_steps - 1, known[region]):
                skipped.add(region)
            else:
                known[region] += 1
            if "network" in skipped:
                break  # the inner region is part of it
        steps.append(skipped)
    return steps


class RegionState:
    """What one guidance branch of one run keeps of a region.

    Attributes:
        rule (SkipRule): when it is skipped.
        history (OutputHistory): of its last module.
        placeholders (dict): number of another module -> shapes of its output.
    """

    def __init__(self, config: StepCacheConfig) -> None:
        self.rule = SkipRule(config)
        self.history = OutputHistory(config.order, config.error_feedback)
        self.placeholders: dict[int, Placeholder] = {}

    def may_skip(self, run: Run) -> bool:
        """Whether to skip the region at the present step; noted."""
        # No line leads through two outputs at one timestep.
        repeated = bool(self.history.times) and run.time == self.history.times[-1]
        known = 0 if repeated else len(self.history)
        return self.rule(run.remaining, run.last, known)


class CacheContext(Context):
    """What is known while a network with step caching is called in one thread.

    Attributes:
        time (float): timestep of the call.
        state (dict): region -> :class:`RegionState`, of the branch that is called; empty where
            nothing is kept.
        skipped (set): regions that are skipped in this call.
        tracker (RunTracker): the thread's runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0
        self.state: dict[str, RegionState] = {}
        self.skipped: set[str] = set()
        self.tracker: RunTracker | None = None
        # Calls in a row that began a run, for the warning that none is ever continued.
        self.lone_calls = 0
        # Steps skipped in the run, for the warning that there were none.
        self.run_skips = 0

    def forget_run(self) -> None:
        if self.tracker is not None:
            self.tracker.clear()

    def stop(self) -> None:
        super().stop()
        self.state, self.skipped = {}, set()


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
        self.configs = tuple(configs)
        self.adapter = adapter
        self.regions = {config.region: Region(config) for config in configs}
        self.timeline = Timeline(model, adapter.timestep_scale)

    def new_state(self) -> dict[str, RegionState]:
        """What a guidance branch of a run keeps."""
        return {config.region: RegionState(config) for config in self.configs}

    def tracker(self, context: CacheContext) -> RunTracker:
        """The runs of this thread."""
        if context.tracker is None:
            leader = None if self.leader is None else self.leader.tracker(self.leader.context)
            context.tracker = RunTracker(self.new_state, leader)
        return context.tracker

    def place(self, network: nn.Module) -> None:
        """Intercept the calls of the network, and those of its inner modules if these may be
        skipped."""
        intercept(network, NetworkCall(self))
        if "inner" in self.regions:
            modules = inner_modules(self.regions["inner"].config, self.adapter, network)
            for index, module in enumerate(modules):
                intercept(module, InnerCall(self, index, index == len(modules) - 1))
                _tell_diffusers(type(module))


class NetworkCall(Interceptor):
    """The call of the network: which regions to skip, and the whole of it if that is one."""

    skips = True

    def end_run(self) -> None:
        self.patch.context.forget_run()

    def set_branch(self, name: str | None) -> None:
        self.patch.tracker(self.patch.context).branch_name = name

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
            output = self.output(context, module, proceed, args, kwargs)
        except BaseException:
            patch.tracker(context).drop()
            raise
        finally:
            context.stop()
        self.finish(context, run, output)
        return output

    @eager_only()
    def begin(self, context: CacheContext, args: tuple, kwargs: dict[str, Any]) -> Run:
        """Find the run of this call and decide which regions to skip."""
        patch: CachePatch = self.patch
        context.start()
        tracker = patch.tracker(context)
        timestep = patch.adapter.timestep(args, kwargs)
        time, shared = read_timestep(timestep)
        if not shared:
            patch.warn_once(
                "mixed",
                "step caching skips nothing in calls whose images are at different timesteps; "
                "denoise them in step, or call the network for each of them",
            )
            time = None
        remaining, last = None, None
        if time is not None:
            remaining, last = patch.timeline(time, tracker.first_time(time), patch.warn_once)
        latents, conditioning = latents_of(args, kwargs), conditioning_of(args, kwargs)
        form = kwargs.get("return_dict")
        run = tracker.begin(Call(time, latents, remaining, last, conditioning, form))
        self.watch(context, run, time)
        if run.step == 0 and len(run.called) == 1:
            context.run_skips = 0
        if remaining is None and shared:
            patch.warn_once(
                "unknown",
                "step caching skips nothing, since it is not known how much of the run remains at "
                f"timestep {timestep!r}; apply it to the pipeline instead of the network",
            )
        context.time = time
        # Without a timestep no call continues another: nothing needs to be kept.
        context.state = {} if time is None else run.branch.state
        for region in patch.regions:
            if region in context.state and context.state[region].may_skip(run):
                context.skipped.add(region)
                context.run_skips += 1
                if region == "network":
                    break  # the inner region is part of it
        return run

    def watch(self, context: CacheContext, run: Run, time: float | None) -> None:
        """Warn if call after call begins a run of its own."""
        begins = run.step == 0 and len(run.called) == 1
        if not begins:
            context.lone_calls = 0
        elif time is not None and time != context.time:  # views of one image begin together
            context.lone_calls += 1
        if context.lone_calls == _LONE_CALLS:
            self.patch.warn_once(
                "unrelated",
                f"step caching skips nothing: {_LONE_CALLS} calls in a row did not follow from the "
                "one before. Rising timesteps (inversion), noise that is added at every step "
                "and unrelated inputs cannot be extrapolated",
            )

    def output(
        self, context: CacheContext, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """The network's output at this step, computed or extrapolated."""
        region = self.patch.regions.get("network")
        if region is None or "network" not in context.state:
            return proceed(module, *args, **kwargs)
        history = context.state["network"].history
        if "network" in context.skipped:
            region.skipped += 1
            return history.extrapolate(context.time)
        output = proceed(module, *args, **kwargs)
        region.computed += 1
        return history.record(context.time, output)

    @eager_only()
    def finish(self, context: CacheContext, run: Run, output: Any) -> None:
        """Note the output; after the last step, warn if nothing was skipped in the run."""
        context.tracker.end(output)
        if run.last and not context.run_skips:
            self.patch.warn_once(
                "nothing",
                f"step caching skipped nothing in a run of {run.step + 1} step"
                f"{'' if run.step == 0 else 's'}: too few steps lie in timestep_range, or the "
                "scheduler adds noise at every step. Use more steps, a wider timestep_range, or a "
                "deterministic scheduler",
            )


class InnerCall(Interceptor):
    """The call of one module of the inner region.

    Args:
        patch (CachePatch): of the network.
        index (int): number of the module, in running order.
        is_last (bool): whether its output is that of the region.
    """

    skips = True

    def __init__(self, patch: CachePatch, index: int, is_last: bool) -> None:
        super().__init__(patch)
        self.index = index
        self.is_last = is_last

    @eager_only(inner=True)
    def call(self, module: nn.Module, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        context: CacheContext = self.patch.context
        state = context.state.get("inner")
        if state is None or not context.running:
            return proceed(module, *args, **kwargs)
        region = self.patch.regions["inner"]
        if "inner" in context.skipped:
            if not self.is_last:
                return state.placeholders[self.index].make()
            region.skipped += 1
            return state.history.extrapolate(context.time)
        output = proceed(module, *args, **kwargs)
        if not self.is_last:
            state.placeholders[self.index] = Placeholder(output)
            return output
        region.computed += 1
        return state.history.record(context.time, output)


def _tell_diffusers(cls: type) -> None:
    """Let diffusers' own caches, which look up blocks by class, know an intercepted one."""
    helpers = sys.modules.get("diffusers.hooks._helpers")
    blocks = getattr(helpers, "TransformerBlockRegistry", None)
    if blocks is not None:
        with contextlib.suppress(Exception):  # diffusers' own affair, and private there
            blocks._register()
            blocks._registry.setdefault(cls, blocks._registry[cls._intercepted_class])


def inner_modules(config: StepCacheConfig, adapter: Any, network: nn.Module) -> list[nn.Module]:
    """The modules of the inner region, in running order.

    Raises:
        ToMeError: the network has none inside ``config.num_outer_blocks``.
    """
    modules = adapter.inner_modules(network, config.num_outer_blocks)
    if not modules:
        raise ToMeError(
            f"step cache: {type(network).__name__} has no levels or blocks inside the "
            f"{config.num_outer_blocks} outermost, so region='inner' would skip nothing; write "
            "region='network'"
        )
    return modules
