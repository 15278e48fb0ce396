# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The node. Everything goes through ComfyUI's public patches, on a clone of the model: no module of
its network is changed, and other clones stay as they are."""

from __future__ import annotations

import logging
import math
import zlib
from typing import Any

import torch
from torch import Tensor

import mmagic_tome  # noqa: F401  (first: it mends a torchvision that does not fit torch)
from mmagic_tome.calls import CachedCalls
from mmagic_tome.errors import ToMeError
from mmagic_tome.merging import bipartite_match, random_layout, tokens_to_remove
from mmagic_tome.merging.random import step_key

_CELL = 2  # side of the cells that keep one token each
_NEARLY = 0.9999  # samplers may round sigmas
_LOG = logging.getLogger("mmagic_tome")


class MMagicToMe:
    """Model in, model out: skips calls of the network and merges its tokens."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "model_patches"
    DESCRIPTION = (
        "Faster sampling without training. tolerance: expected relative error of the final latent "
        "(0 skips nothing). ratio: fraction of the tokens to merge in a UNet's self-attention "
        "(0 merges none)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs as ComfyUI takes them."""
        tolerance = {"default": 0.02, "min": 0.0, "max": 0.5, "step": 0.005, "round": 0.0001}
        ratio = {"default": 0.0, "min": 0.0, "max": 0.75, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL",),
                "tolerance": ("FLOAT", tolerance),
                "ratio": ("FLOAT", ratio),
            }
        }

    def apply(self, model: Any, tolerance: float, ratio: float) -> tuple[Any]:
        """Return a clone of the model with both.

        Raises:
            ToMeError: A value out of range; merging for a network without the patches it needs.
        """
        if not 0 <= ratio <= 0.75:
            raise ToMeError(f"ratio={ratio!r} must be in [0, 0.75]; write ratio=0.5")
        patched = model.clone()
        if ratio > 0:
            network = patched.model.diffusion_model
            if not hasattr(network, "input_blocks"):
                raise ToMeError(
                    f"ratio={ratio:g}: {type(network).__name__} is no UNet, and ComfyUI has no "
                    "patches with which its tokens can be merged; write ratio=0"
                )
            merging = TokenMerging(ratio)
            patched.set_model_attn1_patch(merging.before)
            patched.set_model_attn1_output_patch(merging.after)
        if tolerance > 0:
            before = patched.model_options.get("model_function_wrapper")
            wrapper = StepCaching(tolerance, patched.model, before)
            patched.set_model_unet_function_wrapper(wrapper)
        return (patched,)


NODE_CLASS_MAPPINGS = {"MMagicToMe": MMagicToMe}
NODE_DISPLAY_NAME_MAPPINGS = {"MMagicToMe": "Step caching and token merging (mmagic_tome)"}


# --- step caching ---------------------------------------------------------------------------------


class StepCaching:
    """A wrapper of the model's function.

    ComfyUI calls it with x, sigma and the conditioning, and expects the denoised latent. What is
    extrapolated is the prediction that belongs to it: v of models that predict v, otherwise
    ``(x - denoised) / sigma``, the noise of epsilon models and the velocity of flow models.

    Args:
        tolerance: As of :class:`~mmagic_tome.cache.StepCacheConfig`.
        model: ComfyUI's ``BaseModel``: its ``model_sampling`` scales latents and places sigmas.
        before: A wrapper that was there already, which then runs inside. Default: None.
    """

    def __init__(self, tolerance: float, model: Any, before: Any = None) -> None:
        self.calls = CachedCalls({"tolerance": tolerance}, timestep_scale=None)
        self.model, self.before = model, before
        kind = getattr(getattr(model, "model_type", None), "name", "")
        self.predicts_v = kind.startswith("V_PREDICTION")
        self._given: Tensor | None = None  # ComfyUI's tensor, a new one in every run
        self._sigmas: Tensor | None = None  # of its steps
        self._warned = False

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        """Return the denoised latent of a call; ``args`` as ComfyUI passes them."""
        x, sigma, conditioning = args["input"], args["timestep"], args["c"]
        options = conditioning.get("transformer_options", {})
        scale, slope = self._denoised(sigma, x)
        computed: list[Tensor] = []

        def compute() -> Tensor:
            if self.before is not None:
                denoised = self.before(apply_model, args)
            else:
                denoised = apply_model(x, sigma, **conditioning)
            computed[:] = [denoised, (denoised - scale * x) / slope]
            return computed[1]

        if not self._begin(options.get("sample_sigmas"), sigma):
            compute()
            return computed[0]
        # As the network gets them, of one size along the run: errors are relative to it.
        latents = self.sampling.calculate_input(sigma, x)
        with torch.no_grad():
            prediction = self.calls(
                compute, latents, self.timesteps(sigma), branch=_branch(args, options)
            )
        if bool((sigma * _NEARLY <= self._sigmas[-1]).all()):
            self._log()
        if computed and prediction is computed[1]:
            return computed[0]  # bit for bit, where nothing was added to it
        return scale * x + slope * prediction

    @property
    def sampling(self) -> Any:
        """The model's sampling: other nodes may replace it until the model is loaded."""
        return self.model.model_sampling

    def _denoised(self, sigma: Tensor, x: Tensor) -> tuple[Any, Tensor]:
        """(a, b) of ``denoised = a x + b prediction``."""
        sigma = sigma.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        if self.predicts_v:
            squared = 1 + sigma**2
            return 1 / squared, -sigma / squared.sqrt()
        return 1.0, -sigma

    def _begin(self, sigmas: Tensor | None, sigma: Tensor) -> bool:
        """Note the schedule of a new run; whether a call at sigma is one of its steps."""
        if sigmas is None:
            self._warn_of_old_version()
            return False
        if sigmas is not self._given:
            # Its end is no step: 0, what is left of the noise, or UniPC's 0.001.
            self._given, self._sigmas = sigmas, sigmas[:-1][sigmas[:-1] > 0]
            if len(self._sigmas):
                self.calls.timesteps = self.timesteps(self._sigmas)
            self.calls.handle.reset_run()  # the last one may have been interrupted
            self.calls.handle.reset_stats()
        return len(self._sigmas) > 0 and bool((sigma >= _NEARLY * self._sigmas[-1]).all())

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """Timesteps of sigmas; between those of the training, interpolated."""
        known = getattr(self.sampling, "log_sigmas", None)
        if known is None:
            return self.sampling.timestep(sigmas).cpu().double()
        known, wanted = known.cpu().double(), sigmas.cpu().double().log()
        above = torch.searchsorted(known, wanted.contiguous()).clamp(1, len(known) - 1)
        low, high = known[above - 1], known[above]
        return above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)

    def _warn_of_old_version(self) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning(
                "step caching skips nothing: this ComfyUI does not pass sample_sigmas in "
                "transformer_options; update it"
            )

    def _log(self) -> None:
        handle = self.calls.handle
        steps, predicted = handle.steps or [], handle.predicted_error or [0.0]
        skipped = sum(step != "computed" for step in steps)
        _LOG.info(
            "step caching skipped %d of %d steps, predicted error %.4f",
            *(skipped, len(steps), max(predicted)),
        )


def _branch(args: dict[str, Any], options: dict[str, Any]) -> str:
    """A name of what a call computes: cond, uncond or both, and of which prompts."""
    kinds = args.get("cond_or_uncond") or options.get("cond_or_uncond") or []
    return " ".join(map(str, [*kinds, *(options.get("uuids") or [])])) or "all"


# --- token merging --------------------------------------------------------------------------------


class TokenMerging:
    """The patches before and after the self-attention of every block; merges at the finest grid
    that has any, the first that a call of the UNet meets."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.finest: int | None = None  # downsample factor
        self.plan: Any = None  # of the attention under way
        self.tokens: tuple[int, int] | None = None  # before and after merging, at the last call

    def before(self, n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple:
        """Merge the (B, N, C) tokens that queries, keys and values are computed of."""
        self.plan = self._plan(n, options) if context.shape == n.shape else None
        if self.plan is None:
            return n, context, value
        merged = self.plan.merge(n)
        self.tokens = n.shape[1], merged.shape[1]
        keys = merged if context is n else self.plan.merge(context)
        values = keys if value is context else self.plan.merge(value)
        return merged, keys, values

    def after(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        """Copy every merged token of the output to where it came from."""
        plan, self.plan = self.plan, None
        return n if plan is None else plan.unmerge(n)

    def _plan(self, n: Tensor, options: dict[str, Any]) -> Any:
        grid = self._grid(n.shape[1], options)
        if grid is None:
            return None
        height, width = grid
        downsample = round(options["original_shape"][-2] / height)
        if self.finest is None or downsample < self.finest:
            self.finest = downsample
        if downsample > self.finest:
            return None
        # Another destination in every cell, block and step, the same for the same seed.
        place = (*(options.get("block") or ()), options.get("block_index", 0))
        seed, step = zlib.crc32(repr(place).encode()), None
        if options.get("sigmas") is not None:
            step = step_key(options["sigmas"].reshape(-1)[0])
        layout = random_layout(height, width, _CELL, _CELL, seed=seed, step=step, device=n.device)
        destinations, sources = layout.select(0)
        count = tokens_to_remove(n.shape[1], len(sources), self.ratio)
        return bipartite_match(n.detach(), destinations, sources, count) if count > 0 else None

    @staticmethod
    def _grid(tokens: int, options: dict[str, Any]) -> tuple[int, int] | None:
        """(height, width) of the tokens; None if they are no grid of the latent."""
        shape = options.get("activations_shape")
        if shape is not None and len(shape) == 4 and shape[-2] * shape[-1] == tokens:
            return tuple(shape[-2:])
        height, width = options["original_shape"][-2:]
        for level in range(8):
            grid = math.ceil(height / 2**level), math.ceil(width / 2**level)
            if grid[0] * grid[1] == tokens:
                return grid
        return None
