# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching of a function, for programs that have no module to apply it to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .cache.config import CacheSpec, coerce_cache
from .cache.skip import CachePatch
from .errors import ToMeError
from .handle import CacheHandle
from .models.base import ModelAdapter


class CachedCalls:
    """Skips calls of a function that denoises, and extrapolates what it would return.

    What a call returns must enter the next latent linearly, as an epsilon, v or x0 prediction does
    in all samplers; latents and outputs are of one shape.

    Args:
        config: As for :func:`~mmagic_tome.apply.apply_cache`; a function has no inner levels, so
            the network is skipped as a whole or not at all.
        timestep_scale: The timestep of pure noise, for runs without :attr:`timesteps`. Default
            1000.

    Attributes:
        handle: A :class:`~mmagic_tome.handle.CacheHandle` with the statistics.

    Raises:
        ToMeError: An invalid option.

    Example:
        >>> calls = CachedCalls({"tolerance": 0.02})
        >>> calls.timesteps = [999, 899, 799]
        >>> with torch.no_grad():
        ...     noise = calls(lambda: network(x, 999), x, 999)
    """

    def __init__(self, config: CacheSpec = None, timestep_scale: float | None = 1000.0) -> None:
        self._network = Function()
        self._model = _Model()
        configs = coerce_cache(config)
        if any(one.region != "network" for one in configs):
            raise ToMeError(
                "a function has no inner region: write region='network', or leave region out"
            )
        self._patch = CachePatch(configs, _Adapter(timestep_scale), self._model)
        self._patch.place(self._network)
        self.handle = CacheHandle([("", self._network, self._patch)])

    @property
    def timesteps(self) -> Sequence[float]:
        """Timesteps of the run, falling. Assign those of a new run before its first call; without
        any a run's end cannot be told from its timesteps alone."""
        return self._patch.timeline.timesteps()

    @timesteps.setter
    def timesteps(self, values: Sequence[float]) -> None:
        self._model.scheduler.timesteps = torch.as_tensor(values).cpu().double()

    def __call__(
        self,
        function: Callable[[], Tensor],
        latents: Tensor,
        timestep: float | Tensor,
        conditioning: Tensor | None = None,
        branch: str | None = None,
    ) -> Tensor:
        """What ``function()`` returns, or an extrapolation.

        Args:
            function: Computes the output, of the shape of ``latents``.
            latents: (B, ...), that it denoises; copies for guidance one after the other.
            timestep: Of all images of the call.
            conditioning: (B, ...), which tells branches of guidance apart that are called one after
                the other. Default None: their order does.
            branch: A name for the branch; wins over ``conditioning``. Default None.
        """
        with self._network.cache_context(branch):
            return self._network(latents, timestep, encoder_hidden_states=conditioning, do=function)


class Function(nn.Module):
    """A module whose call is that of a function."""

    def forward(self, latents: Tensor, timestep: Any, *, do: Callable, **_: Any) -> Tensor:
        """Return ``do()``."""
        return do()

    @contextlib.contextmanager
    def cache_context(self, name: str | None) -> Iterator[None]:
        """Name the branch of the calls inside, as models of diffusers have it."""
        yield


class _Adapter(ModelAdapter):
    description, timestep_position = "a function", 1

    def __init__(self, timestep_scale: float | None) -> None:
        self.timestep_scale = timestep_scale

    def blocks(self, network: nn.Module) -> list:
        return []


class _Model:
    """In place of a pipeline: an object with a scheduler that has timesteps."""

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(timesteps=None)
