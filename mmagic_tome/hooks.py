# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The hooks: what happens around a network, a stack, a block and a site while they run.

Small objects of top-level classes, so that a model with them can be copied, pickled and
compiled. What they share is in :mod:`.state`; who gets which is in :mod:`.engine`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ToMeError
from .graphs import Outside
from .merging import MergePlan
from .merging.frames import FramePlan, as_clips
from .merging.joint import JointPlan, split_sequence
from .merging.random import hashed_integers, step_key
from .merging.reductions import PrunedPlan
from .methods import Method, PlanRequest
from .models import Host
from .reuse import foretold
from .schedules import Place
from .state import BlockState, Forward, MergeState, SiteState
from .temporal import Memory, Run


class StepHook:
    """A hook that may decide by the step: out of compiled graphs then, see :mod:`.graphs`."""

    def __init__(self, state: MergeState) -> None:
        self.state = state

    def __call__(self, *call: Any) -> Any:
        return self.outside(*call) if self.by_step else self.run(*call)

    @property
    def by_step(self) -> bool:
        """Whether anything here depends on the step."""
        return self.state.config.plans_by_step

    @Outside()
    def outside(self, *call: Any) -> Any:
        return self.run(*call)

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], *output: Any) -> Any:
        raise NotImplementedError


class NetworkHook(StepHook):
    """One of the network itself, which also sees to what is left out."""

    @property
    def by_step(self) -> bool:
        return self.state.config.tracks_steps


class NetworkPreHook(NetworkHook):
    """Start of a forward: forget the last one, note the timestep, go on with the run."""

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.state
        config = state.config
        if config.tracks_steps:
            state.lead_compiled()
        # A forward that did not come to its end may have left half of a step.
        broken = state.forward.running
        for forward in state.forwards:
            forward.clear(running=True)
        if config.dense:
            return
        if config.across_frames:
            frames = state.host.frames(args, kwargs)
            for forward in state.forwards:
                forward.frames = frames
        timestep = state.host.timestep(args, kwargs)
        if config.tracks_steps:
            time = None if timestep is None else _as_float(timestep)
            noise = None if time is None else state.host.noise_level(time)
            pictures = _pictures_of_call(args, kwargs)
            key = None if torch.is_grad_enabled() else _shape_of(pictures)
            for forward in state.forwards:
                if broken or key is None:
                    forward.lanes.reset()
                forward.lanes.begin_step(time, key, pictures)
                forward.noise = noise
                self.leave_out(forward)
        if not config.use_rand or timestep is None:
            return
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(float(timestep))
        # One layout serves the whole batch, so its first timestep speaks for all.
        step = step_key(timestep.detach().reshape(-1)[0])
        for forward in state.forwards:
            forward.step = step

    def leave_out(self, forward: Forward) -> None:
        """Say which scopes do not run at this step; with gradients all do."""
        scopes = self.state.scopes
        if not scopes or torch.is_grad_enabled() or forward.run.time is None:
            return
        forward.foretold = foretold(scopes, forward.run, forward.noise)
        forward.remembered = frozenset(scope.name for scope in scopes)
        if "network" in forward.foretold:
            forward.run.leave_out()


class NetworkPostHook(NetworkHook):
    """End of a forward: drop what belonged to it (a compiled graph would return it)."""

    def run(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        watches = self.state.config.watches_output
        for forward in self.state.forwards:
            if watches:
                pictures = _pictures_of_call(args, kwargs)
                forward.run.heat = _heat(forward.run, pictures, _first(output))
            forward.clear(running=False)


class StackPreHook(StepHook):
    """Note the token grid."""

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        host = self.state.host
        height, width = host.grid(module, args, kwargs)
        before = host.text_before(args, kwargs)
        for forward in self.state.forwards:
            forward.grid = (height * forward.frames, width)
            forward.before = before


class BlockPreHook(StepHook):
    """Make the plans that the sites of the block share, from the tokens that enter it."""

    def __init__(self, state: MergeState, block: BlockState) -> None:
        super().__init__(state)
        self.block = block

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state, block = self.state, self.block
        config, forward = state.config, state.forward
        forward.plans = {}
        forward.refreshing = True
        if config.ratio_schedule.zero and config.residual_plan is None:
            return
        metric = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            made_for, plans, before = block.saved.get(metric, (None, None, None))
            if made_for is not config:
                plans = self.plans(metric)
                block.saved[metric] = (config, plans, forward.before)
            else:
                forward.before = before
        else:
            plans = self.plans(metric)
        forward.plans = plans

    def plans(self, metric: Tensor) -> dict[str, MergePlan | None]:
        """Plans for (B, N, C) tokens, or a (B, C, h, w) picture, of this block by kind of site."""
        state, block = self.state, self.block
        config, forward = state.config, state.forward
        if not forward.running or forward.grid is None:
            raise ToMeError(
                f"{block.name} was called outside a forward of its network, so the token grid is "
                "not known. Call the network; for gradient checkpointing, write "
                "use_reentrant=False (diffusers' default)"
            )
        height, width = forward.grid
        if metric.dim() == 4:
            metric = metric.flatten(2).transpose(1, 2)
        if forward.frames > 1:
            metric = as_clips(metric, forward.frames)
        tokens = metric.shape[1]
        if block.text_beside and tokens > height * width:
            text = tokens - height * width
            before = text if forward.before is None else forward.before
            _, metric = split_sequence(metric.detach(), text, before)
        elif tokens != height * width:
            raise ToMeError(
                f"{block.name} was given {tokens} tokens for a grid of {height}x{width}; "
                "token merging needs one token per grid place"
            )
        schedule, refresh, run = config.ratio_schedule, config.refresh_plan, forward.run
        if schedule.constant and not refresh.keeps and len(config.built_methods) == 1:
            plan = self.shared(metric, schedule.spec, 0, {})
            return dict.fromkeys(block.kinds, plan)
        ratios = {}
        for kind in block.kinds:
            place = Place(kind, block.downsample, block.depth, len(state.blocks), forward.noise)
            ratios[kind] = schedule(place)
        # Where a schedule begins to merge there is nothing yet that could serve on.
        begins = any(ratios[kind] > 0 for kind in block.kinds if (block.name, kind) in run.unmerged)
        last = run.refreshed.get(block.name, -1)
        forward.refreshing = begins or refresh.overdue(last, run.step, block.depth)
        if forward.refreshing:
            run.refreshed[block.name] = run.step
        if state.residual is not None and state.residual.kind == "reuse":
            return {}
        plans, made = {}, {}
        for kind, ratio in ratios.items():
            owner = (block.name, kind)
            if ratio <= 0:
                # Also where a plan was meant to serve on: a schedule ends at the step it names.
                plans[kind] = None
                run.unmerged.add(owner)
            elif not forward.refreshing and owner in run.plans:
                plans[kind] = run.plans[owner]
            else:
                plans[kind] = self.shared(metric, ratio, config.method_at(kind), made)
                run.unmerged.discard(owner)
                if refresh.keeps:
                    run.plans[owner] = plans[kind]
        return plans

    def shared(
        self, metric: Tensor, ratio: float, number: int, made: dict[tuple, MergePlan | None]
    ) -> MergePlan | None:
        """The plan at a ratio, by a method: one that was made in this step, or a new one.

        Made for this block (``made``), or with ``share='level'`` for any of the level: then a block
        gets another only where its ratio or its depth asks for one.
        """
        state, block = self.state, self.block
        config, forward = state.config, state.forward
        method = config.built_methods[number]
        key: tuple = (number, ratio)
        if config.refresh_plan.share == "level":
            made = forward.shared
            variant = method.variant(block.depth, len(state.blocks))
            key = (number, ratio, block.downsample, forward.grid, variant)
        if key not in made:
            made[key] = self.make(metric, ratio, method)
        return made[key]

    def make(self, metric: Tensor, ratio: float, method: Method) -> MergePlan | None:
        """A new plan, by the method; None if there is nothing to merge."""
        if ratio <= 0:
            return None
        state, block = self.state, self.block
        config, forward = state.config, state.forward
        height, width = forward.grid
        request = PlanRequest(
            height=height,
            width=width,
            sx=config.sx,
            sy=config.sy,
            downsample=block.downsample,
            level=len({b.downsample for b in state.blocks if b.downsample < block.downsample}),
            depth=block.depth,
            num_blocks=len(state.blocks),
            step=max(forward.run.step, 0),
            timestep=forward.noise,
            exact=config.exact_matching,
            layout=Layout(state, block, metric.device),
            draw=Draw(state, block, metric.device),
            guidance_map=forward.run.heat,
        )
        plan = method.plan(metric.detach(), ratio, request)
        if plan is not None and not torch.compiler.is_compiling():
            block.plans += 1
        if plan is not None and forward.frames > 1:
            return FramePlan(plan, forward.frames)
        return plan


class Layout:
    """() -> (destinations, sources) of a block; drawn only if the method asks."""

    def __init__(self, state: MergeState, block: BlockState, device: torch.device) -> None:
        self.state, self.block, self.device = state, block, device

    def __call__(self) -> tuple[Tensor, Tensor]:
        return self.state.layout(*self.state.forward.grid, self.block, self.device)


class Draw:
    """(upper, count) -> random numbers of a block and step, for methods that ask."""

    def __init__(self, state: MergeState, block: BlockState, device: torch.device) -> None:
        self.state, self.block, self.device = state, block, device

    def __call__(self, upper: int, count: int) -> Tensor:
        # The upper half of the seed tells the blocks apart, and these numbers from the layouts'.
        seed = self.state.config.seed + (self.block.depth + 1 << 32)
        return hashed_integers(upper, seed, self.state.forward.step, 1, count, self.device)[0]


class SitePreHook:
    """Merge the tokens that go into a site."""

    def __init__(self, state: MergeState, site: SiteState) -> None:
        self.state = state
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        state, site = self.state, self.site
        x = args[0] if args else kwargs["hidden_states"]
        plan = _plan_before(state.forward, site, x)
        _saw(state.forward, site, x, plan)
        if plan is None:
            return None
        check_site(site, plan, x, kwargs, state.host)
        return _with_merged(state, site, plan, x, args, kwargs)


class AlikePreHook:
    """Merge the same tokens for a further module of a site; counted where the site begins."""

    def __init__(self, state: MergeState, site: SiteState) -> None:
        self.state = state
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        x = args[0] if args else kwargs["hidden_states"]
        plan = _plan_before(self.state.forward, self.site, x)
        return None if plan is None else _with_tokens(plan.merge(x), args, kwargs)


class SitePostHook:
    """Unmerge the tokens that come out of a site."""

    def __init__(self, state: MergeState, site: SiteState) -> None:
        self.state = state
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        forward = self.state.forward
        site = self.site
        y = _tokens_of(site, output)
        plan = _plan_after(forward, site, y)
        _drop_plans_after_last(forward, site)
        if plan is None or site.kind == "attn_kv":
            return None
        return _replaced(site, output, plan.unmerge(y))


class CarriedPreHook(StepHook):
    """As :class:`SitePreHook` where something is added to what the merged site gives.

    That is the tokens themselves around a block or stack, whose own additions to them are what
    is merged, and a residual where there is one.
    """

    def __init__(self, state: MergeState, site: SiteState) -> None:
        super().__init__(state)
        self.site = site

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        state, site = self.state, self.site
        forward, residual = state.forward, state.residual
        x = args[0] if args else kwargs["hidden_states"]
        plan = _plan_before(forward, site, x)
        memory = forward.run.memories.get(site.name)
        if residual is not None and (forward.refreshing or memory is None):
            forward.pending[site.name] = ("refresh", x, args, kwargs)
            _saw(forward, site, x, None)
            return None
        if residual is not None and residual.kind == "reuse":
            # A module cannot be skipped by a hook: it runs on one token, which nobody reads.
            forward.pending[site.name] = ("reuse", x)
            site.saw(x.shape[1] * forward.frames - _text(forward, site, x), 0)
            alone = PrunedPlan(
                torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device),
                1,
            )
            return state.host.adapt(site.name, alone, *_with_tokens(x[:, :1], args, kwargs))
        if plan is None:
            # Where nothing is merged nothing is missing.
            forward.pending[site.name] = ("dense",)
            _saw(forward, site, x, None)
            return None
        check_site(site, plan, x, kwargs, state.host)
        _saw(forward, site, x, plan)
        if site.kind == "attn_kv":
            forward.pending[site.name] = ("merged", x, None)
            return _with_merged(state, site, plan, x, args, kwargs)
        merged = plan.merge(x)
        forward.pending[site.name] = ("merged", x, merged)
        args, kwargs = _weighted(site, plan, x, *_with_tokens(merged, args, kwargs))
        return state.host.adapt(site.name, plan, args, kwargs)


class CarriedPostHook(StepHook):
    """The counterpart of :class:`CarriedPreHook`."""

    def __init__(self, state: MergeState, site: SiteState) -> None:
        super().__init__(state)
        self.site = site

    def run(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        state, site = self.state, self.site
        forward, residual = state.forward, state.residual
        done, *kept = forward.pending.pop(site.name)
        if done == "dense":
            _drop_plans_after_last(forward, site)
            return None
        out = _tokens_of(site, output)
        adds = site.kind in ("block", "stack")  # their output is their input plus something
        look_up = _plan_before if done == "refresh" else _plan_after
        plan = look_up(forward, site, out)
        _drop_plans_after_last(forward, site)
        run = forward.run
        if done == "refresh":
            if run.time is not None:
                memory = run.memories.setdefault(site.name, Memory())
                lost = self.lost(plan, out, adds, *kept)
                memory.keep(run.time, lost, residual.order)
            return None
        x = kept[0]
        if done == "reuse":
            y = residual.predict(run.memories[site.name], run.time)
        else:
            merged = kept[1]
            y = out - merged if adds else out
            if site.kind != "attn_kv":
                y = plan.unmerge(y)
            if residual is not None:
                y = y + residual.predict(run.memories[site.name], run.time)
        return _replaced(site, output, x + y if adds else y)

    def lost(
        self,
        plan: MergePlan | None,
        out: Tensor,
        adds: bool,
        x: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The residual of this step: what the dense output has and the merged one lacks."""
        state, site = self.state, self.site
        kind = state.residual.kind
        dense = out - x if adds else out
        if kind == "reuse":
            return dense
        if plan is None:
            return torch.zeros_like(dense)
        check_site(site, plan, x, kwargs, state.host)
        if kind == "own":
            return dense - plan.unmerge(plan.merge(dense))
        # The merged run goes past the hooks, which are in the middle of this one.
        forward = state.forward
        if site.kind == "attn_kv":
            args, kwargs = _with_merged(state, site, plan, x, args, kwargs)
            return dense - _tokens_of(site, site.modules[0].forward(*args, **kwargs))
        merged = y = plan.merge(x)
        outer = dict(forward.pending)
        args, kwargs = _weighted(site, plan, x, args, kwargs)
        args, kwargs = state.host.adapt(site.name, plan, args, kwargs)
        for module in site.modules:
            args, kwargs = _with_tokens(y, args, kwargs)
            y = _tokens_of(site, module.forward(*args, **kwargs))
        forward.pending = outer
        return dense - plan.unmerge(y - merged if adds else y)


def check_site(
    site: SiteState, plan: MergePlan, x: Tensor, kwargs: dict[str, Any], host: Host
) -> None:
    """Uses of a block that cannot be merged, said in the user's words."""
    if x.shape[1] != plan.num_tokens or x.shape[0] != plan.batch:
        raise ToMeError(
            f"{site.name} was given {tuple(x.shape[:2])} (batch, tokens) but its block has "
            f"({plan.batch}, {plan.num_tokens}): feed-forward chunking and merge_mlp exclude each "
            "other; call disable_forward_chunking() or write merge_mlp=False"
        )
    masked = kwargs.get("attention_mask") is not None and not host.takes_masks
    if site.kind != "mlp" and masked:
        context = kwargs.get("encoder_hidden_states")
        if site.kind in ("block", "stack") or (
            site.kind != "crossattn" and (context is None or context.shape[1] == plan.num_tokens)
        ):
            raise ToMeError(
                f"{site.name} was given an attention_mask over image tokens, which has no meaning "
                "for merged tokens; call the model without it or leave this site out"
            )
    if site.kind == "attn_kv" and kwargs.get(site.context) is not None:
        raise ToMeError(
            f"{site.name} takes keys and values from other tokens (only_cross_attention, "
            "attention_injection), which cannot be merged by the picture's; write sites=['attn']"
        )
    masks = kwargs.get("ip_adapter_masks")
    if masks is None:
        masks = (kwargs.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
    if site.kind in ("crossattn", "block", "stack") and masks is not None:
        raise ToMeError(
            f"{site.name} was given ip_adapter_masks, which are laid over the token grid and do "
            "not fit merged tokens; merge self-attention only"
        )


def _drop_plans_after_last(forward: Forward, site: SiteState) -> None:
    """Free the plans once the block needs them no more: its feed-forward needs the memory."""
    if site.last:
        forward.plans = {}


def _plan_before(forward: Forward, site: SiteState, x: Tensor) -> MergePlan | None:
    """The plan for what goes into a site dense; a plan that leaves alone the text beside it."""
    plan = forward.plans.get(site.kind)
    if plan is None or not site.text_beside:
        return plan
    return JointPlan(plan, x.shape[1] - plan.num_tokens, forward.before)


def _plan_after(forward: Forward, site: SiteState, y: Tensor) -> MergePlan | None:
    """The same, for what comes out of it merged."""
    plan = forward.plans.get(site.kind)
    if plan is None or not site.text_beside:
        return plan
    return JointPlan(plan, y.shape[1] - plan.num_slots, forward.before)


def _text(forward: Forward, site: SiteState, x: Tensor) -> int:
    """How many of the tokens that go into a site are the text's."""
    if not site.text_beside or forward.grid is None:
        return 0
    height, width = forward.grid
    return x.shape[1] - height * width


def _saw(forward: Forward, site: SiteState, x: Tensor, plan: MergePlan | None) -> None:
    """Note a call, in tokens of the picture."""
    # A backward that runs a block again does so when the grid is forgotten.
    text = plan.num_text_tokens if isinstance(plan, JointPlan) else _text(forward, site, x)
    frames = plan.num_frames if isinstance(plan, FramePlan) else forward.frames
    tokens = x.shape[1] * frames
    kept = tokens if plan is None else plan.num_slots
    site.saw(tokens - text, kept - text)


def _with_merged(
    state: MergeState, site: SiteState, plan: MergePlan, x: Tensor, args: tuple, kwargs: dict
):
    args, kwargs = _weighted(site, plan, x, args, kwargs)
    if site.kind == "attn_kv":
        return args, {**kwargs, site.context: plan.merge(x)}
    return state.host.adapt(site.name, plan, *_with_tokens(plan.merge(x), args, kwargs))


def _weighted(
    site: SiteState, plan: MergePlan, x: Tensor, args: tuple, kwargs: dict
) -> tuple[tuple, dict[str, Any]]:
    """A call of self-attention that is told what its keys stand for: log(size) is added to their
    scores, so that a softmax counts each of them as often."""
    if site.weights is None:
        return args, kwargs
    # Inverses may have sizes below 0; nothing else comes near to this.
    weight = plan.size.float().clamp_min(1e-3).log().to(x.dtype)
    return args, {**kwargs, site.weights: weight[:, None]}


def _with_tokens(x: Tensor, args: tuple, kwargs: dict):
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": x}


def _first(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    return output[0]


def _tokens_of(site: SiteState, output: Any) -> Tensor:
    """The picture's tokens in what a site returns."""
    return output if isinstance(output, Tensor) else output[site.returns]


def _replaced(site: SiteState, output: Any, y: Tensor) -> Any:
    if not isinstance(output, tuple):
        return y
    return (*output[: site.returns], y, *output[site.returns + 1 :])


def _as_float(timestep: Any) -> float:
    """First of the timesteps as a number; waits for the device where it is a tensor there."""
    if isinstance(timestep, Tensor):
        return float(timestep.detach().reshape(-1)[0])
    return float(timestep)


def _pictures_of_call(args: tuple, kwargs: dict[str, Any]) -> list[Tensor] | None:
    """What the network is to denoise; None if it is not known."""
    named = (kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs)
    x = args[0] if args else next(named, None)
    if x is None:
        x = next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    pictures = x if isinstance(x, list) else [x]
    return pictures if all(isinstance(picture, Tensor) for picture in pictures) else None


def _shape_of(pictures: list[Tensor] | None) -> Hashable:
    """What must stay the same from step to step; None if it is not known."""
    if pictures is None:
        return None
    return tuple((tuple(one.shape), one.dtype, one.device) for one in pictures)


def _heat(run: Run, pictures: list[Tensor] | None, output: Tensor) -> Tensor | None:
    """(B / 2, h, w): how far the text moves the prediction at every place of the picture; None
    where the halves of a batch are not the same picture without and with the text."""
    if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[0] % 2:
        return None
    if run.guided is None:
        # Looked at once in a run, since a GPU has to be waited for.
        halves = [] if pictures is None else pictures[0].chunk(2)
        run.guided = len(halves) == 2 and torch.equal(*halves)
    if not run.guided:
        return None
    empty, text = output.detach().chunk(2)
    return (text - empty).abs().mean(1)
