# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Finds the networks inside pipelines, models and wrappers, and the adapters that describe them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..errors import ToMeError
from .base import ModelAdapter
from .registry import ADAPTERS
from .unsupported import why_unsupported

# Attributes of diffusers' pipelines and MMagic's models with a denoising network. Combined
# pipelines (Kandinsky, Stable Cascade) have those of the pipelines inside under these names too.
DENOISERS = (
    *("unet", "unet_2", "transformer", "transformer_2", "unconditional_transformer"),
    *("prior", "prior_prior", "decoder", "image_unet", "super_res_first", "super_res_last"),
)
# Attributes with the wrapped module: of torch.compile, DistributedDataParallel, MMagic's
# DiffusersWrapper.
_WRAPPERS = ("_orig_mod", "module", "model")
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Denoiser:
    """A network that an adapter describes. ``name``: the attribute of the pipeline or model that
    holds it, e.g. 'transformer_2'; '' if there is only one."""

    name: str
    adapter: ModelAdapter
    network: nn.Module


def find_adapter(model: object) -> tuple[ModelAdapter, nn.Module]:
    """Return the adapter and the network of a model; the first one where there are several.

    Args:
        model: a diffusers pipeline, a MMagic model, or the network itself, also wrapped by
            DistributedDataParallel, torch.compile or MMagic's DiffusersWrapper.

    Raises:
        ToMeError: no network inside is of a known family; names the modules that were tried.
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
            text = f"{name!r} ({type(network).__name__}) of this {owner} stays as it is. "
            warnings.warn(text + _why(network), stacklevel=3)
    return served if len(served) > 1 else [replace(served[0], name="")]


def find_controlnets(model: object, *, known: bool = False) -> list[Denoiser]:
    """Return the ControlNets of a pipeline or MMagic model, empty if it has none.

    They are named 'controlnet', or 'controlnet.nets.0' and so on where there are several.

    Args:
        known: leave out those that no adapter describes. Default False: they are an error.

    Raises:
        ToMeError: a ControlNet that no adapter describes.
    """
    found = []
    for name, network in _controlnets(model).items():
        if not known or _search(network).served:
            found.append(replace(_search_or_raise(network).served[0], name=name))
    return found


def _controlnets(model: object) -> dict[str, nn.Module]:
    branches = (_attribute(layer, "controlnet") for layer in _layers(model))
    branch = next((one for one in branches if isinstance(one, nn.Module)), None)
    nets = _attribute(branch, "nets")
    if isinstance(nets, nn.ModuleList):
        return {f"controlnet.nets.{index}": net for index, net in enumerate(nets)}
    return {} if branch is None else {"controlnet": branch}


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
                break
            if called is None and _runs_blocks_itself(layer):
                called = layer
        _search_attributes(layer, found)
        if found.served:
            break
    return found


def _search_attributes(model: object, found: _Found) -> None:
    known = set()
    for name in DENOISERS:
        network = _attribute(model, name)
        if isinstance(network, nn.Module) and network not in known:
            known.add(network)
            inner = _search(network)
            found.tried += inner.tried
            found.served += [replace(one, name=name) for one in inner.served[:1]]
            if not inner.served:
                found.unserved[name] = network


def _selected(owner: str, found: _Found, only: list[str]) -> list[Denoiser]:
    names = [one.name for one in found.served if one.name]
    for name in only:
        if name in found.unserved:
            raise ToMeError(f"{name!r} cannot be selected. {_why(found.unserved[name])}")
    unknown = ", ".join(repr(name) for name in only if name not in names)
    if unknown or not only:
        raise ToMeError(
            f"{unknown or 'an empty list'} selects no denoiser of this {owner}. It has: "
            f"{', '.join(names) or 'a single network without a name; leave the selection out'}"
        )
    return [one for one in found.served if one.name in only]


def _why(network: nn.Module) -> str:
    name = type(network).__name__
    return why_unsupported(name).strip() or f"{name}: no adapter is written for it."


def _search_or_raise(model: object) -> _Found:
    found = _search(model)
    if found.served:
        return found
    known = "; ".join(adapter.description for adapter in ADAPTERS)
    reason = next(filter(None, map(why_unsupported, found.tried)), "")
    raise ToMeError(
        f"found no supported network in a {type(model).__name__} (tried: "
        f"{', '.join(found.tried)}). {reason}Supported: {known}. Pass one of these, or a pipeline "
        "or model that contains one; for a model of your own write an adapter: "
        "docs/adding_a_model.md"
    )


def _runs_blocks_itself(wrapper: nn.Module) -> bool:
    # MMagic's ViCo replaces ``forward`` of the wrapper. The UNet's own forward never runs, so the
    # wrapper is the network whose call begins and ends a forward.
    own = "forward" in vars(wrapper) and "_orig_mod" not in wrapper._modules
    return own and hasattr(wrapper, "down_blocks")


def _layers(model: object) -> Iterator[object]:
    """Yield a model and what it wraps, outermost first."""
    for _ in range(_MAX_DEPTH):
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
