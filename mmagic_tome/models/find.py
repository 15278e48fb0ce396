# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Finds the networks inside pipelines, models and wrappers, and the adapters that describe them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from ..errors import ToMeError
from .base import ModelAdapter
from .registry import ADAPTERS
from .unsupported import why_unsupported

# Attributes of diffusers' pipelines and MMagic's models with a denoising network. Combined
# pipelines (Kandinsky, Stable Cascade) have those of the pipelines inside under these names too.
DENOISERS = (
    "unet",
    "unet_2",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "prior",
    "prior_prior",
    "decoder",
    "image_unet",
    "super_res_first",
    "super_res_last",
)
# Attributes with the wrapped module: of torch.compile, DistributedDataParallel, MMagic's
# DiffusersWrapper.
_WRAPPERS = ("_orig_mod", "module", "model")
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Denoiser:
    """A network that an adapter describes.

    Attributes:
        name: the attribute of the pipeline or model that holds it, e.g. 'transformer_2'; '' if
            there is only one.
    """

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
    found = _search(model)
    if not found.served:
        raise _nothing_found(model, found)
    return found.served[0].adapter, found.served[0].network


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
    found = _search(model)
    if not found.served:
        raise _nothing_found(model, found)
    served = found.served
    if only is not None:
        served = _selected(model, found, [only] if isinstance(only, str) else list(only))
    elif warn:
        for name, network in found.unserved.items():
            warnings.warn(
                f"{name!r} ({type(network).__name__}) of this {type(model).__name__} stays as it "
                f"is. {_why(network)}",
                stacklevel=3,
            )
    if len(served) == 1:
        return [Denoiser("", served[0].adapter, served[0].network)]
    return served


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
        served = _search(network).served
        if served:
            found.append(Denoiser(name, served[0].adapter, served[0].network))
        elif not known:
            find_adapter(network)  # says why there is none
    return found


def _controlnets(model: object) -> dict[str, nn.Module]:
    for _ in range(_MAX_DEPTH):
        branch = _attribute(model, "controlnet")
        if isinstance(branch, nn.Module):
            nets = _attribute(branch, "nets")
            if not isinstance(nets, nn.ModuleList):
                return {"controlnet": branch}
            return {f"controlnet.nets.{index}": net for index, net in enumerate(nets)}
        model = _unwrapped(model)
    return {}


@dataclass
class _Found:
    """Networks with an adapter, denoisers without one, and class names of all that was tried."""

    served: list[Denoiser] = field(default_factory=list)
    unserved: dict[str, nn.Module] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)


def _search(model: object) -> _Found:
    found = _Found()
    called = None
    for _ in range(_MAX_DEPTH):
        if model is None:
            break
        found.tried.append(type(model).__name__)
        if isinstance(model, nn.Module):
            adapter = next((one for one in ADAPTERS if one.matches(model)), None)
            if adapter is not None:
                found.served.append(Denoiser("", adapter, called or model))
                break
            if called is None and _runs_blocks_itself(model):
                called = model
        _search_attributes(model, found)
        if found.served:
            break
        model = _unwrapped(model)
    return found


def _search_attributes(model: object, found: _Found) -> None:
    known: set[int] = set()
    for name in DENOISERS:
        network = _attribute(model, name)
        if not isinstance(network, nn.Module) or id(network) in known:
            continue
        known.add(id(network))
        inner = _search(network)
        found.tried += inner.tried
        found.served += [Denoiser(name, one.adapter, one.network) for one in inner.served[:1]]
        if not inner.served:
            found.unserved[name] = network


def _selected(model: object, found: _Found, only: list[str]) -> list[Denoiser]:
    names = [one.name for one in found.served if one.name]
    for name in only:
        if name in found.unserved:
            raise ToMeError(f"{name!r} cannot be selected. {_why(found.unserved[name])}")
    unknown = [name for name in only if name not in names]
    if unknown or not only:
        wrong = ", ".join(map(repr, unknown)) or "an empty list"
        raise ToMeError(
            f"{wrong} selects no denoiser of this {type(model).__name__}. It has: "
            f"{', '.join(names) or 'a single network without a name; leave the selection out'}"
        )
    return [one for one in found.served if one.name in only]


def _why(network: nn.Module) -> str:
    name = type(network).__name__
    return why_unsupported(name).strip() or f"{name}: no adapter is written for it."


def _nothing_found(model: object, found: _Found) -> ToMeError:
    known = "; ".join(adapter.description for adapter in ADAPTERS)
    reason = next(filter(None, map(why_unsupported, found.tried)), "")
    return ToMeError(
        f"found no supported network in a {type(model).__name__} (tried: "
        f"{', '.join(found.tried)}). {reason}Supported: {known}. Pass one of these, or a pipeline "
        "or model that contains one; for a model of your own write an adapter: "
        "docs/adding_a_model.md"
    )


def _runs_blocks_itself(wrapper: nn.Module) -> bool:
    """Return whether a wrapper's own forward calls the blocks inside directly.

    MMagic's ViCo replaces ``forward`` of the wrapper. The UNet's own forward never runs, so the
    wrapper is the network whose call begins and ends a forward.
    """
    own = "forward" in vars(wrapper) and "_orig_mod" not in wrapper._modules
    return own and hasattr(wrapper, "down_blocks")


def _unwrapped(model: object) -> nn.Module | None:
    inner = (_attribute(model, name) for name in _WRAPPERS)
    return next((module for module in inner if isinstance(module, nn.Module)), None)


def _attribute(owner: object, name: str) -> object:
    # Some wrappers raise errors other than AttributeError for a missing name.
    try:
        return getattr(owner, name, None)
    except Exception:
        return None
