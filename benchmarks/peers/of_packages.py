# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching of diffusers and of cache-dit, on a diffusion transformer.

They run as their packages have them, each on a copy of the transformer with the same weights: hooks
of diffusers keep their state beyond a run, and a copy leaves with it. Stable Diffusion 3 in
diffusers has no ``enable_cache``; what that method calls for other transformers is called here.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmagic_tome.lab.methods import Method
from mmagic_tome.lab.networks import share_weights

#: How diffusers finds the attention of a joint block: its own patterns look for 'attn1'.
_ATTENTION = (r"transformer_blocks.*attn",)


class _Place:
    """Tells the hooks where in the denoising loop a call is, as a pipeline of a transformer with
    ``cache_context`` does; both guidance branches are in one batch here.

    Args:
        scheduler: the pipeline's.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timestep = 1000  #: of the call that runs

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        timesteps = self.scheduler.timesteps
        timestep = torch.as_tensor(kwargs["timestep"]).flatten()[0]
        self.timestep = int(timestep)
        step = int((timesteps - timestep).abs().argmin())
        context = CacheContext(
            "run",
            step_index=step,
            num_inference_steps=len(timesteps),
            timestep=timestep,
            sigma=float(self.scheduler.sigmas[step]),
        )
        _set_cache_context(module, context)


def _method(name: str, apply: Callable[[nn.Module, _Place], None]) -> Method:
    """A method that applies something to a copy of the transformer."""

    @contextmanager
    def function(pipeline: Any) -> Iterator[None]:
        original, place = pipeline.transformer, _Place(pipeline.scheduler)
        copy = share_weights(original)
        apply(copy, place)
        copy.register_forward_pre_hook(place.note, with_kwargs=True)
        pipeline.transformer = copy
        try:
            yield
        finally:
            pipeline.transformer = original

    function.__qualname__ = name
    return Method(name, function=function)


def first_block_cache(threshold: float) -> Method:
    """ParaAttention's, in diffusers; its default threshold is 0.05."""

    def apply(network: nn.Module, _: _Place) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(network, FirstBlockCacheConfig(threshold=threshold))

    return _method(f"diffusers FirstBlockCache {threshold:g}", apply)


def taylorseer(interval: int, order: int = 1, lite: bool = False) -> Method:
    """TaylorSeer (arXiv 2503.06923) in diffusers, whose default interval is 5."""

    def apply(network: nn.Module, _: _Place) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        patterns = [r"transformer_blocks\.\d+\.(attn|ff|ff_context)"]
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=lite,
            cache_identifiers=None if lite else patterns,
        )
        apply_taylorseer_cache(network, config)

    kind = ", lite" if lite else ""
    return _method(f"diffusers TaylorSeer {interval}, order {order}{kind}", apply)


def mag_cache(threshold: float, ratios: Sequence[float]) -> Method:
    """MagCache (arXiv 2506.09045) in diffusers, whose default threshold is 0.06.

    Args:
        ratios: Of :func:`mag_ratios`, from a run of as many steps.
    """

    def apply(network: nn.Module, _: _Place) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        config = MagCacheConfig(
            threshold=threshold, num_inference_steps=len(ratios), mag_ratios=list(ratios)
        )
        apply_mag_cache(network, config)

    return _method(f"diffusers MagCache {threshold:g}", apply)


def mag_ratios(pipeline: Any, draw: Callable[[], Any], steps: int) -> list[float]:
    """MagCache's calibration: one run, whose ratios diffusers prints."""

    def apply(network: nn.Module, _: _Place) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        apply_mag_cache(network, MagCacheConfig(num_inference_steps=steps, calibrate=True))

    printed = io.StringIO()
    with _method("calibration", apply).on(pipeline), contextlib.redirect_stdout(printed):
        draw()
    return next(
        ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1")
    )


def pyramid_attention_broadcast(interval: int) -> Method:
    """Pyramid Attention Broadcast (arXiv 2408.12588) in diffusers, at its timesteps."""

    def apply(network: nn.Module, place: _Place) -> None:
        from diffusers.hooks import (
            PyramidAttentionBroadcastConfig,
            apply_pyramid_attention_broadcast,
        )

        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval,
            spatial_attention_block_identifiers=_ATTENTION,
            current_timestep_callback=lambda: place.timestep,
        )
        apply_pyramid_attention_broadcast(network, config)

    return _method(f"diffusers PyramidAttentionBroadcast {interval}", apply)


def faster_cache(guided: bool, interval: int = 2) -> Method:
    """FasterCache (arXiv 2410.19355) in diffusers, at its defaults but for the block skip range.

    Args:
        guided: Whether there is an unconditional branch to skip.
        interval: Attention is computed at every so many steps.
    """

    def apply(network: nn.Module, place: _Place) -> None:
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        config = FasterCacheConfig(
            spatial_attention_block_skip_range=interval,
            spatial_attention_block_identifiers=_ATTENTION,
            attention_weight_callback=lambda module: 0.3,
            current_timestep_callback=lambda: place.timestep,
            tensor_format="BCHW",
            is_guidance_distilled=not guided,
        )
        apply_faster_cache(network, config)

    return _method(f"diffusers FasterCache {interval}", apply)


def sea_cache(threshold: float) -> Method:
    """SeaCache (arXiv 2602.18993) in diffusers, whose default threshold is 0.25."""

    def latents(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return [image[:, None] for image in kwargs["hidden_states"]]  # clips of one frame

    def apply(network: nn.Module, _: _Place) -> None:
        from diffusers.hooks import SeaCacheConfig, apply_sea_cache

        config = SeaCacheConfig(threshold=threshold, raw_vision_callback=latents)
        apply_sea_cache(network, config)

    return _method(f"diffusers SeaCache {threshold:g}", apply)


def cache_dit(name: str = "defaults", taylorseer: bool = False, **options: Any) -> Method:
    """cache-dit's DBCache.

    Args:
        name: What is special about it.
        taylorseer: With its calibrator of that name, of order 1.
        options: Of ``DBCacheConfig``. Default: none, cache-dit's own.
    """

    @contextmanager
    def function(pipeline: Any) -> Iterator[None]:
        import cache_dit as package

        original = pipeline.transformer
        pipeline.transformer = share_weights(original)
        more = {}
        if options:
            more["cache_config"] = package.DBCacheConfig(**options)
        if taylorseer:
            more["calibrator_config"] = package.TaylorSeerCalibratorConfig(taylorseer_order=1)
        try:
            package.enable_cache(pipeline, **more)
            yield
        finally:
            with contextlib.suppress(Exception):  # where enabling failed there is nothing to undo
                package.disable_cache(pipeline)
            pipeline.transformer = original

    function.__qualname__ = name
    return Method(f"cache-dit {name}", function=function)
