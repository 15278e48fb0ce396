# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Denoising networks: UNets and diffusion transformers by the shapes of published checkpoints.

Shapes are those of the checkpoints' ``config.json``; time and memory of a forward depend on them
and not on the values of the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..apply import apply_cache, apply_tome
from ..config import ToMeConfig
from ..contenders import apply_tomesd
from ..errors import ToMeError
from ..models import ModelAdapter, find_adapter
from ..patch import find_patch
from ..settings import Setting
from ..tome.state import Target, TomePatch
from .kinds import CONTENDERS, TOMESD, Call, Merging, Noise, Shape

# A forward holds about this many tensors of the widest level's size at its peak: the input of
# the feed-forward, its two halves of 4 x the width, and what waits for it (skips, residuals).
# Measured on Stable Diffusion's finest level: 24.
_TENSORS = 32
# Timestep of a single forward, of 1000.
MIDDLE = 500
# Attention that is written out holds the scores of all pairs, and their softmax.
_SCORES = 2


# --- how tokens are merged ------------------------------------------------------------------------


class DenoiserMerging(Merging):
    """``apply_tome`` and ``apply_cache`` on a known model, tomesd, MMagic's own, and an ideal."""

    contenders = CONTENDERS
    denoises = True

    def options(self, args: argparse.Namespace) -> dict[str, Any]:
        if args.r is not None:
            raise ToMeError(f"--r is for vision transformers; for {args.target} write --ratio")
        if args.ratio == 0:
            raise ToMeError("--ratio 0 merges nothing: there is nothing to compare")
        ratio = 0.5 if args.ratio is None else args.ratio
        return dict(ratio=ratio, max_downsample=args.max_downsample or "auto")

    def config(self, options: Mapping[str, Any]) -> Setting:
        return Setting.coerce(options)

    def own(self, everybody: Mapping[str, Any], options: Mapping[str, Any]) -> Setting:
        # Step caching on its own merges nothing.
        alone = set(options) == {"cache"}
        return self.config(options if alone else {**everybody, **options})

    def ours(self, network: nn.Module, config: Setting, run: Call) -> list[dict[str, Any]]:
        handle = None if config.tome is None else apply_tome(network, config.tome)
        if config.cache is not None:
            apply_cache(network, config.cache)
        run(network)
        return [] if handle is None else handle.stats()

    def other(self, kind: str, network: nn.Module, config: Setting, run: Call) -> None:
        options = _tomesd_options(config.tome, network)
        if kind == TOMESD:
            apply_tomesd(network, options)
        else:
            _apply_mmagic(network, options)
        run(network)

    def ideal(self, network: nn.Module, sites: list[dict[str, Any]], run: Call) -> None:
        """The same targets get the first M of N tokens and are padded with zeros afterwards."""
        # Merging knows where targets begin and end; nothing of it stays in the network.
        kinds = list(dict.fromkeys(site["kind"] for site in sites))
        coarsest = max(site["downsample"] for site in sites)
        adapter, inner = find_adapter(network)
        with apply_tome(network, targets=kinds, max_downsample=coarsest):
            targets = {one.name: one for one in find_patch(inner, TomePatch).targets}
        for site in sites:
            target = targets[site["target"]]
            take = _Take(adapter, target, site["tokens"], site["kept"])
            for path in (target.paths[0], *target.shared):
                module = inner.get_submodule(path)
                module.register_forward_pre_hook(take, with_kwargs=True)
            if target.kind != "attn_kv":
                module = inner.get_submodule(target.paths[-1])
                module.register_forward_hook(_Pad(take), with_kwargs=True)
        run(network)


def _tomesd_options(config: ToMeConfig, network: nn.Module) -> dict[str, Any]:
    """The options that tomesd and MMagic's copy of it know, as keyword arguments."""
    level = config.max_downsample
    if level == "auto":
        adapter, network = find_adapter(network)
        level = min(block.downsample for block in adapter.blocks(network))
    options = {name: getattr(config, name) for name in ("ratio", "sx", "sy", "use_rand")}
    switches = {f"merge_{kind}": kind in config.targets for kind in ("attn", "crossattn", "mlp")}
    return {"max_downsample": level, **options, **switches}


def _apply_mmagic(network: nn.Module, options: dict[str, Any]) -> None:
    """MMagic's ``tomesd_cfg`` as MMagic itself would apply it, to the network alone."""
    try:
        from mmagic.models.utils import set_tomesd
    except ImportError as error:
        raise ToMeError(f"MMagic cannot be imported: {error}") from error
    # It looks for a class of this name, and what it finds decides which block it puts in.
    set_tomesd(type("StableDiffusion", (), {"unet": network})(), **options)


class _Take:
    """Pre-hook: the first of the tokens, for free.

    Args:
        adapter (ModelAdapter): changes other arguments of a module, such as its rotary table.
        target (Target): where the tokens go in.
        tokens, kept (int): of the picture, before and after.
    """

    def __init__(self, adapter: ModelAdapter, target: Target, tokens: int, kept: int) -> None:
        self.adapter, self.name, self.kind = adapter, target.name, target.kind
        self.context, self.returns = target.context_argument, target.output_index
        self.removed, self.plan = tokens - kept, _FirstTokens(tokens, kept)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] < self.plan.num_tokens:
            raise ToMeError(f"there is no ideal for {self.name}: its tokens come in parts")
        if self.plan.representative.device != x.device:  # the first call
            self.plan.representative = self.plan.representative.to(x.device)
        # Text, where there is some, is in front.
        x = x[:, : x.shape[1] - self.removed]
        if self.kind == "attn_kv":
            return args, {**kwargs, self.context: x}
        if args:
            args = (x, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": x}
        return self.adapter.adapt(self.name, self.plan, args, kwargs)


class _Pad:
    """Hook: zeros for the tokens that were not computed."""

    def __init__(self, take: _Take) -> None:
        self.take = take

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        space, at = (0, 0, 0, self.take.removed), self.take.returns
        if not isinstance(output, tuple):
            return F.pad(output, space)
        return (*output[:at], F.pad(output[at], space), *output[at + 1 :])


class _FirstTokens:
    """What :meth:`ModelAdapter.adapt` asks of a plan, for tokens that stand for themselves.

    One entry serves the whole batch: it is the same for all.
    """

    batch = 1

    def __init__(self, tokens: int, kept: int) -> None:
        self.num_tokens, self.num_slots = tokens, kept
        self.representative = torch.arange(kept)[None]


DENOISER_MERGING = DenoiserMerging()


# --- shapes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoiser(Shape):
    """A network of diffusers by its constructor's arguments.

    Attributes:
        name (str): of the class in diffusers.
        arguments (dict): of its constructor.
        factor (int): pixels per place of the latent, per side.
        text (int): number of text tokens.
    """

    size: int = 512
    batch: int = 2  # one picture with classifier-free guidance
    name: str = "UNet2DConditionModel"
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    factor: int = 8
    text: int = 77

    @property
    def merging(self) -> Merging:
        return DENOISER_MERGING

    @property
    def unit(self) -> int:
        levels = len(self.arguments.get("block_out_channels", (0,)))
        return self.factor * 2 ** (levels - 1) * self.arguments.get("patch_size", 1)

    def network(self) -> nn.Module:
        import diffusers

        return getattr(diffusers, self.name)(**self.arguments)

    def call(self, network: nn.Module, size: tuple[int, int], batch: int, noise: Noise) -> Call:
        return denoiser_call(network, size, batch, noise, self.factor, self.text)

    def activations(self, size: tuple[int, int], batch: int, written_out: bool) -> int:
        options = self.arguments
        side = self.factor * options.get("patch_size", 1)
        tokens = size[0] // side * (size[1] // side)
        if "block_out_channels" in options:
            width, heads = options["block_out_channels"][0], options["attention_head_dim"]
            heads = heads[0] if isinstance(heads, tuple) else heads
        else:
            heads = options["num_attention_heads"]
            width, tokens = heads * options["attention_head_dim"], tokens + self.text
        numbers = batch * tokens * width * _TENSORS
        return numbers + (batch * heads * tokens**2 * _SCORES if written_out else 0)


_SD_LEVELS = dict(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
)
_SD3 = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
)
_FLUX = dict(
    patch_size=1,
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
    axes_dims_rope=(16, 56, 56),
)
_SD3_CLASS = "SD3Transformer2DModel"
_FLUX_CLASS = "FluxTransformer2DModel"

DENOISERS = {
    "small": Denoiser(
        "about the demo model's network (needs no files)",
        arguments=dict(
            block_out_channels=(64, 128, 192),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            layers_per_block=1,
            cross_attention_dim=192,
            attention_head_dim=(1, 2, 3),
        ),
        size=256,
        factor=4,
        text=24,
    ),
    "sd15": Denoiser(
        "Stable Diffusion 1.5",
        arguments=dict(cross_attention_dim=768, attention_head_dim=8, **_SD_LEVELS),
    ),
    "sd15-level0": Denoiser(
        "its finest level alone, where eta is measured without the noise of the rest",
        arguments=dict(
            block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
    ),
    "sd21": Denoiser(
        "Stable Diffusion 2.1",
        arguments=dict(
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            **_SD_LEVELS,
        ),
        size=768,
    ),
    "sdxl": Denoiser(
        "Stable Diffusion XL",
        arguments=dict(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        size=1024,
    ),
    "sd3": Denoiser(
        "Stable Diffusion 3 medium", name=_SD3_CLASS, arguments=_SD3, size=1024, text=333
    ),
    "sd3-block": Denoiser(
        "one of its 24 blocks",
        name=_SD3_CLASS,
        arguments={**_SD3, "num_layers": 1},
        size=1024,
        text=333,
    ),
    "flux": Denoiser(
        "Flux.1 dev",
        name=_FLUX_CLASS,
        arguments=_FLUX,
        size=1024,
        factor=16,
        batch=1,
        text=512,
    ),
    "flux-block": Denoiser(
        "one of its 19 double and one of its 38 single blocks",
        name=_FLUX_CLASS,
        arguments={**_FLUX, "num_layers": 1, "num_single_layers": 1},
        size=1024,
        factor=16,
        batch=1,
        text=512,
    ),
}


# --- calls, one per family ------------------------------------------------------------------------


def denoiser_call(
    network: nn.Module,
    size: tuple[int, int],
    batch: int,
    noise: Noise,
    factor: int,
    text: int,
) -> Call:
    """A function that runs a denoising network; see :meth:`Shape.call`.

    Args:
        factor: pixels per place of the latent, per side.
        text: number of text tokens.

    Returns:
        callable: network, timestep of 1000 (default 500) -> its output, (B, C, h, w) or
        (B, N, C).
    """
    make = {_SD3_CLASS: _sd3_call, _FLUX_CLASS: _flux_call}
    make = make.get(type(network).__name__, _unet_call)
    return make(network, noise, batch, (size[0] // factor, size[1] // factor), text)


def denoising_run(call: Call, steps: int) -> Call:
    """Forwards at so many timesteps, from noise to picture, in place of one.

    The inputs stay the same: what is measured is time, not pictures.

    Args:
        call: of a denoising network, takes a timestep as its second argument.
        steps: at least 2.

    Returns:
        callable: network -> the mean of its outputs.
    """
    times = [round(1000 * (steps - step) / steps) - 1 for step in range(steps)]

    def run(network: nn.Module) -> Tensor:
        total = call(network, times[0]).clone()
        for time in times[1:]:
            total += call(network, time)
        return total / steps

    return run


def side_unit(network: nn.Module) -> int:
    """Places of the latent that its sides must be multiples of."""
    config = getattr(network, "config", None)
    if hasattr(network, "down_blocks"):
        return 2 ** (len(network.down_blocks) - 1)
    return getattr(config, "patch_size", 1)


def _unet_call(network, noise, batch, grid, text) -> Call:
    config = getattr(network, "config", None)
    channels = getattr(config, "in_channels", None) or network.in_channels
    width = getattr(config, "cross_attention_dim", None)
    if width is None:  # MMagic's DenoisingUnet has no config
        width = _text_width(network)
    x, context = noise(batch, channels, *grid), noise(batch, text, _first(width))
    extra = {}
    if getattr(config, "addition_embed_type", None) == "text_time":
        embedded = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra["added_cond_kwargs"] = dict(
            text_embeds=noise(batch, embedded),
            time_ids=torch.full((batch, 6), 512.0, device=x.device, dtype=x.dtype),
        )

    def call(network: nn.Module, time: int = MIDDLE) -> Tensor:
        timestep = torch.tensor(time, device=x.device)
        return _tensor(network(x, timestep, encoder_hidden_states=context, **extra))

    return call


def _sd3_call(network, noise, batch, grid, text) -> Call:
    config = network.config
    inputs = dict(
        hidden_states=noise(batch, config.in_channels, *grid),
        encoder_hidden_states=noise(batch, text, config.joint_attention_dim),
        pooled_projections=noise(batch, config.pooled_projection_dim),
    )
    device = inputs["hidden_states"].device

    def call(network: nn.Module, time: int = MIDDLE) -> Tensor:
        timestep = torch.full((batch,), float(time), device=device)
        return _tensor(network(timestep=timestep, **inputs))

    return call


def _flux_call(network, noise, batch, grid, text) -> Call:
    config = network.config
    hidden = noise(batch, grid[0] * grid[1], config.in_channels)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    inputs = dict(
        hidden_states=hidden,
        encoder_hidden_states=noise(batch, text, config.joint_attention_dim),
        pooled_projections=noise(batch, config.pooled_projection_dim),
        img_ids=places.to(hidden.device, hidden.dtype),
        txt_ids=torch.zeros(text, 3, device=hidden.device, dtype=hidden.dtype),
    )
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, device=hidden.device, dtype=hidden.dtype)

    def call(network: nn.Module, time: int = MIDDLE) -> Tensor:
        timestep = torch.full((batch,), time / 1000, device=hidden.device, dtype=hidden.dtype)
        return _tensor(network(timestep=timestep, **inputs))

    return call


def _text_width(network: nn.Module) -> int:
    for module in network.modules():
        if hasattr(module, "attn2") and hasattr(module.attn2, "to_k"):
            return module.attn2.to_k.in_features
    raise ToMeError(f"{type(network).__name__} has no cross-attention: its text width is unknown")


def _first(value: Any) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value


def _tensor(output: Any) -> Tensor:
    """The output tensor out of whatever a network returns it in."""
    if isinstance(output, Tensor):
        return output
    return output["sample"] if isinstance(output, dict) else output[0]
