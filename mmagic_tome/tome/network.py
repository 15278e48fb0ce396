# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Hooks around a call of the network: which step of which run it is, and on which token grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graphs import eager_only
from ..latents import conditioning_of, latents_of, read_timestep
from ..merging.random import step_key
from ..patch import Hook
from ..runs import Call
from .state import TomeContext, TomePatch


class StepHook(Hook):
    """A hook that is kept out of compiled graphs where options depend on the step."""

    patch: TomePatch

    def __call__(self, *call: Any) -> Any:
        return self.eager(*call) if self.patch.config.tracks_steps else self.run(*call)

    @eager_only()
    def eager(self, *call: Any) -> Any:
        return self.run(*call)

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], *output: Any) -> Any:
        raise NotImplementedError


class NetworkPreHook(StepHook):
    """Start of a call: forget the last one, note the step."""

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        patch = self.patch
        config = patch.config
        if not torch.compiler.is_compiling():
            patch.settle(module)
        if config.tracks_steps:
            patch.lead_compiled()
        contexts = patch.contexts(shared=config.tracks_steps)
        for context in contexts:
            if context.running:  # compiled code does not notice that a call failed
                context.clear()
            context.start()
            if not (config.merges_nothing or context.disabled):
                context.config = config
        if contexts[0].config is None:
            return
        if config.across_frames:
            frames = patch.adapter.frames(args, kwargs)
            for context in contexts:
                context.frames = frames
        timestep = patch.adapter.timestep(args, kwargs)
        if config.tracks_steps:
            self.track(contexts[0], timestep, args, kwargs)
        if not config.use_rand or timestep is None:
            return
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(float(timestep))
        # One layout serves the whole batch, so its first timestep speaks for all.
        key = step_key(timestep.detach().reshape(-1)[0])
        for context in contexts:
            context.step_key = key

    def track(self, context: TomeContext, timestep: Any, args: tuple, kwargs: dict) -> None:
        """Find the run that this call is a step of."""
        patch, tracker = self.patch, context.tracker
        (time, shared), last = read_timestep(timestep), None
        if time is not None:
            first = tracker.first_time(time)
            context.remaining, last = patch.timeline(time, first, patch.warn_once)
        # With gradients, as in training, steps are unrelated; images at different timesteps are
        # steps of several runs.
        related = shared and not torch.is_grad_enabled()
        latents = latents_of(args, kwargs) if related else ()
        conditioning = conditioning_of(args, kwargs)
        run = tracker.begin(Call(time, latents, context.remaining, last, conditioning))
        context.step = run.step
        context.state = run.branch.state


class NetworkPostHook(StepHook):
    """End of a call, also of one that failed: drop what belonged to it (or a graph returns it)."""

    after = always = True

    def run(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        for context in self.patch.contexts_of_call():
            config = context.config
            if config is not None and config.tracks_steps and context.running:
                self.end_step(context, output)
            context.stop()
            context.clear()

    def end_step(self, context: TomeContext, output: Any) -> None:
        """Note what the network returned; None if it failed."""
        tracker = context.tracker
        if output is None:
            tracker.drop()
            return
        tracker.end(output)


class GridPreHook(StepHook):
    """Note the token grid."""

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        patch = self.patch
        contexts = patch.contexts_of_call()
        if not contexts[0].running or contexts[0].config is None:
            return
        height, width = patch.adapter.grid(module, args, kwargs)
        before = patch.adapter.num_text_tokens_before(args, kwargs)
        for context in contexts:
            context.grid = (height * context.frames, width)
            context.num_before = before
