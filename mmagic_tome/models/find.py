# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""All model adapters, how to add one, and how networks inside pipelines, models and wrappers are
found."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..errors import ToMeError
from .base import ModelAdapter
from .diffusers_unet import AnimateDiffUNet, DiffusersUNet, MMagicUNet, SpatioTemporalUNet
from .flux import Bria, Chroma, Flux, Flux2, HunyuanVideo, LongCatImage, OvisImage
from .joint import SD3, AuraFlow, CogVideoX, CogView3Plus, CogView4, QwenImage
from .one_stream import LTX, DiT, HunyuanDiT, PixArt, SkyReelsV2, Wan
from .z_image import Lumina2, ZImage

_FAMILIES = (
    *(MMagicUNet, AnimateDiffUNet, SpatioTemporalUNet, DiffusersUNet),
    *(DiT, PixArt, HunyuanDiT, SD3, AuraFlow, CogView3Plus, CogView4),
    *(Flux, Flux2, Chroma, Bria, LongCatImage, OvisImage, QwenImage, ZImage, Lumina2),
    *(Wan, SkyReelsV2, LTX, CogVideoX, HunyuanVideo),
)
# The first adapter that matches a module is used, so specific ones come first.
ADAPTERS: list[ModelAdapter] = [family() for family in _FAMILIES]

# Attributes of diffusers' pipelines and MMagic's models with a denoising network. Combined
# pipelines (Kandinsky, Stable Cascade) have those of the pipelines inside under these names too.
DENOISERS = (
    *("unet", "unet_2", "transformer", "transformer_2", "unconditional_transformer"),
    *("prior", "prior_prior", "decoder", "image_unet", "super_res_first", "super_res_last"),
)
# Attributes with the wrapped module: of torch.compile, DistributedDataParallel, MMagic's
# DiffusersWrapper.
_WRAPPERS = ("_orig_mod", "module", "model")

# Pattern of a class name -> why the network is not merged. The first that matches counts.
_REASONS = {
    "(Flux)?MultiControlNet(Model)?": (
        "it contains several ControlNets: call apply_tome with each of its .nets"
    ),
    ".*ControlNetModel": (
        "no adapter is written for this kind of ControlNet; apply_tome(pipeline) merges the "
        "network that it controls"
    ),
    ".*(Transformer([123]D)?(Model)?|DiT(2D)?Model)": (
        "no adapter is written for this transformer "
        "(docs/reference/support.md: what cannot be merged)"
    ),
}


def register_adapter(adapter: ModelAdapter) -> ModelAdapter:
    """Make a model family of your own known to :func:`~mmagic_tome.apply_tome`; return its adapter,
    which takes precedence over those registered before and replaces one of the same class.
    ToMeError: not an instance of :class:`ModelAdapter`, or one without a description."""
    if not isinstance(adapter, ModelAdapter) or not getattr(adapter, "description", None):
        raise ToMeError(
            "a model adapter is an instance of a subclass of mmagic_tome.models.ModelAdapter with "
            f"a description, got {adapter!r}; see docs/howto/add_a_model.md"
        )
    ADAPTERS[:] = [adapter, *(other for other in ADAPTERS if type(other) is not type(adapter))]
    return adapter


@dataclass(frozen=True)
class Denoiser:
    """A network that an adapter describes. ``name``: the attribute of the pipeline or model that
    holds it, e.g. 'transformer_2'; '' if there is only one."""

    name: str
    adapter: ModelAdapter
    network: nn.Module


def find_adapter(model: object) -> tuple[ModelAdapter, nn.Module]:
    """Return the adapter and the network of a model; the first one where there are several.

    ``model`` is a diffusers pipeline, a MMagic model, or the network itself, also wrapped by
    DistributedDataParallel, torch.compile or MMagic's DiffusersWrapper. ToMeError, which names the
    modules that were tried: no network inside is of a known family.
    """
    first = _search_or_raise(model).served[0]
    return first.adapter, first.network


def find_denoisers(
    model: object, *, only: Sequence[str] | None = None, warn: bool = True
) -> list[Denoiser]:
    """Return all denoising networks of a model that an adapter describes.

    ControlNets are not denoisers, unless ``model`` is one; see :func:`find_controlnets`.

    Args:
        model: see :func:`find_adapter`.
        only: names to return. Default: all, such as Wan 2.2's 'transformer' and 'transformer_2'.
        warn: whether to warn of denoisers that no adapter describes. Default True; not with
            ``only``.

    Raises:
        ToMeError: as :func:`find_adapter`; a name in ``only`` that the model does not have, or
            that no adapter describes.
    """
    found = _search_or_raise(model)
    served, owner = found.served, type(model).__name__
    if only is not None:
        served = _selected(owner, found, [only] if isinstance(only, str) else list(only))
    elif warn:
        for name, network in found.unserved.items():
            text = f"{name!r} of this {owner} stays as it is. {_why(type(network).__name__)}"
            warnings.warn(text.strip(), stacklevel=3)
    return served if len(served) > 1 else [replace(served[0], name="")]


def find_controlnets(model: object, *, known: bool = False) -> list[Denoiser]:
    """Return the ControlNets of a pipeline or MMagic model, empty if it has none. They are named
    'controlnet', or 'controlnet.nets.0' and so on where there are several. One that no adapter
    describes is a ToMeError, or left out if ``known``."""
    branches = (_attribute(layer, "controlnet") for layer in _layers(model))
    branch = next((one for one in branches if isinstance(one, nn.Module)), None)
    nets = _attribute(branch, "nets")
    named = {} if branch is None else {"controlnet": branch}
    if isinstance(nets, nn.ModuleList):
        named = {f"controlnet.nets.{index}": net for index, net in enumerate(nets)}
    return [
        replace(_search_or_raise(network).served[0], name=name)
        for name, network in named.items()
        if not known or _search(network).served
    ]


@dataclass
class _Found:
    """Networks with an adapter, denoisers without one, and class names of all that was tried."""

    served: list[Denoiser] = field(default_factory=list)
    unserved: dict[str, nn.Module] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)


def _search(model: object) -> _Found:
    found, called = _Found(), None
    for layer in _layers(model):
        found.tried.append(type(layer).__name__)
        if isinstance(layer, nn.Module):
            adapter = next((one for one in ADAPTERS if one.matches(layer)), None)
            if adapter is not None:
                found.served.append(Denoiser("", adapter, called or layer))
                return found
            # MMagic's ViCo replaces ``forward`` of the wrapper. The UNet's own forward never runs,
            # so the wrapper is the network whose call begins and ends a forward.
            own = "forward" in vars(layer) and "_orig_mod" not in layer._modules
            if called is None and own and hasattr(layer, "down_blocks"):
                called = layer
        networks = {}
        for name in DENOISERS:
            network = _attribute(layer, name)
            if isinstance(network, nn.Module) and network not in networks.values():
                networks[name] = network
        for name, network in networks.items():
            inner = _search(network)
            found.tried += inner.tried
            found.served += [replace(one, name=name) for one in inner.served[:1]]
            if not inner.served:
                found.unserved[name] = network
        if found.served:
            return found
    return found


def _selected(owner: str, found: _Found, only: list[str]) -> list[Denoiser]:
    names = [one.name for one in found.served if one.name]
    for name in only:
        if name in found.unserved:
            why = _why(type(found.unserved[name]).__name__)
            raise ToMeError(f"{name!r} cannot be selected. {why.strip()}")
    unknown = ", ".join(repr(name) for name in only if name not in names)
    if unknown or not only:
        raise ToMeError(
            f"{unknown or 'an empty list'} selects no denoiser of this {owner}. It has: "
            f"{', '.join(names) or 'a single network without a name; leave the selection out'}"
        )
    return [one for one in found.served if one.name in only]


def _search_or_raise(model: object) -> _Found:
    found = _search(model)
    if found.served:
        return found
    known = "; ".join(adapter.description for adapter in ADAPTERS)
    reason = next(filter(None, (_why(name, "") for name in found.tried)), "")
    raise ToMeError(
        f"found no supported network in a {type(model).__name__} (tried: "
        f"{', '.join(found.tried)}). {reason}Supported: {known}. Pass one of these, or a pipeline "
        "or model that contains one; for a model of your own write an adapter: "
        "docs/howto/add_a_model.md"
    )


def _why(name: str, otherwise: str = "no adapter is written for it") -> str:
    reasons = (why for pattern, why in _REASONS.items() if re.fullmatch(pattern, name))
    why = next(reasons, otherwise)
    return f"{name}: {why}. " if why else ""


def _layers(model: object) -> Iterator[object]:
    """Yield a model and what it wraps, outermost first."""
    for _ in range(6):
        if model is None:
            return
        yield model
        inner = (_attribute(model, name) for name in _WRAPPERS)
        model = next((one for one in inner if isinstance(one, nn.Module)), None)


def _attribute(owner: object, name: str) -> object:
    # Some wrappers raise errors other than AttributeError for a missing name.
    try:
        return getattr(owner, name, None)
    except Exception:
        return None
