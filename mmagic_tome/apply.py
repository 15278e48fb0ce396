# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Apply token merging and step caching to a model, and take them out again.

Nothing of a model is re-written. Token merging registers PyTorch's own module hooks on what a model
adapter names; step caching intercepts the calls of the network and of its inner modules.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .cache import StepCacheConfig, coerce_cache
from .cache.skip import CachePatch, inner_modules
from .config import ToMeConfig
from .errors import ToMeError
from .graphs import prepare_compiler
from .handle import CacheHandle, ToMeHandle
from .models import Denoiser, find_controlnets, find_denoisers
from .patch import find_patch, remove
from .timeline import warn_of_oscillation
from .tome.place import blocks_to_merge, place
from .tome.state import TomePatch
from .validate import check_bool

if TYPE_CHECKING:
    from .base_handle import Handle
    from .vit import ViTHandle


def apply_tome(
    model: object,
    config: ToMeConfig | Mapping[str, Any] | None = None,
    *,
    denoisers: Sequence[str] | None = None,
    **options: Any,
) -> ToMeHandle | ViTHandle:
    """Merge tokens in ``model`` from now on, in place.

    Args:
        model: a diffusers UNet, diffusion transformer or pipeline, a MMagic model (or its
            ``unet``), MMagic's native ``DenoisingUnet``; or a vision transformer of timm,
            transformers or mmpretrain.
        config: a :class:`ToMeConfig`, a dict of its options, or None for the defaults (ratio 0.5,
            keys and values of self-attention, at the finest level). For a vision transformer a
            dict of options of :func:`mmagic_tome.vit.apply_tome_vit`.
        denoisers: names of the denoisers of a pipeline to merge, such as ``['transformer']``.
            Default: all that it has.
        **options: options of :class:`ToMeConfig` (or of ``apply_tome_vit``); they win over
            ``config``.

    Returns:
        ToMeHandle: to look at, change and remove what was applied; as a context manager it removes
        on exit. Applying to a model that already has token merging replaces it; as a context
        manager the earlier one is put back on exit. For a vision transformer a
        :class:`mmagic_tome.vit.ViTHandle`.

    Raises:
        ToMeError: an invalid option, a model of no known family, or a combination that would merge
            nothing; nothing is changed then.

    Example:
        >>> handle = apply_tome(pipeline, ratio=0.5)
        >>> image = pipeline("a red apple").images[0]
        >>> print(handle.summary())
    """
    found = _denoisers_or_vit(model, denoisers)
    if not isinstance(found, list):
        from .vit import apply_tome_vit

        return apply_tome_vit(found, config, **options)
    config = ToMeConfig.coerce(config, **options)
    chosen = _with_blocks(found, config)
    own = config.controlnet_config
    if own is not None:
        # Looked at before anything is changed, like the network itself.
        controlnets = find_controlnets(model)
        if not controlnets:
            raise ToMeError(
                f"controlnet=True asks for a ControlNet, and a {type(model).__name__} has none; "
                "leave it out, or pass a model or pipeline that has it as .controlnet"
            )
        for one in controlnets:
            chosen.append((own, one, blocks_to_merge(one.adapter, one.network, own)))
    prepare_compiler()
    replaced = _replaced(model, [one.network for _, one, _ in chosen], TomePatch)
    denoising = {one.network for one in found}
    patched = []
    for config, one, blocks in chosen:
        patch = place(config, one.adapter, one.network, blocks, model)
        patch.with_denoiser = one.network not in denoising
        patched.append((one, patch))
    return ToMeHandle(_parts(patched), replaced)


def apply_cache(
    model: object,
    config: str | StepCacheConfig | Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    denoisers: Sequence[str] | None = None,
    controlnet: bool = True,
    **options: Any,
) -> CacheHandle:
    """Skip part of ``model`` at some steps of every denoising run from now on, in place.

    Args:
        model: as for :func:`apply_tome`, vision transformers aside. Pass the pipeline where there
            is one: its scheduler says how much of a run remains.
        config: ``'quality'``, ``'balanced'`` or ``'fast'``; a :class:`StepCacheConfig` or a dict of
            its options; or a list of these, one per region. Default ``'balanced'``. With
            ``tolerance=0.01`` every run predicts its own error and skips what keeps the final
            latent within 1 % of the baseline's, see :class:`StepCacheConfig`.
        denoisers: names of the denoisers of a pipeline to cache. Default: all that it has.
        controlnet: skip the ControlNets at the same steps. With False they run at every step, also
            where the network that reads their output is skipped. Default True.
        **options: options of one :class:`StepCacheConfig`.

    Returns:
        CacheHandle: see :func:`apply_tome`.

    Raises:
        ToMeError: an invalid option, a model of no known family, or a network without an inner
            region; nothing is changed then.

    Example:
        >>> handle = apply_cache(pipeline, "balanced")
        >>> image = pipeline("a red apple").images[0]
        >>> print(handle.summary())
    """
    configs = coerce_cache(config, **options)
    check_bool("", "controlnet", controlnet)
    found = find_denoisers(model, only=denoisers)
    chosen = [(configs, one) for one in found]
    # A ControlNet's levels only go down, so nothing is inside them.
    network = tuple(one for one in configs if one.region == "network")
    if controlnet and network:
        chosen += [(network, one) for one in find_controlnets(model, known=True)]
    for own, one in chosen:
        for cache in own:
            if cache.region == "inner":
                inner_modules(cache, one.adapter, one.network)
    warn_of_oscillation(model, configs)
    prepare_compiler()
    replaced = _replaced(model, [one.network for _, one in chosen], CachePatch)
    patched: list[tuple[Denoiser, CachePatch]] = []
    for own, one in chosen:
        # ControlNets come after the network that they are called for.
        leader = None if one in found else patched[0][1]
        patch = CachePatch(own, one.adapter, model, leader)
        patch.with_denoiser = one not in found
        patch.place(one.network)
        patched.append((one, patch))
    experts = [patch for _, patch in patched if patch.leader is None]
    for patch in experts:
        patch.experts = tuple(one for one in experts if one is not patch)
    return CacheHandle(_parts(patched), replaced)


def remove_tome(model: object) -> bool:
    """Undo :func:`apply_tome`; the model is bit for bit what it was.

    Args:
        model: whatever :func:`apply_tome` takes.

    Returns:
        bool: whether there was anything to remove.
    """
    return _remove(get_handle(model, "tome"))


def remove_cache(model: object) -> bool:
    """Undo :func:`apply_cache`; as :func:`remove_tome`."""
    return _remove(get_handle(model, "cache"))


def _remove(handle: Handle | None) -> bool:
    if handle is not None:
        handle.remove()
    return handle is not None


def get_handle(
    model: object, technique: str | None = None
) -> ToMeHandle | CacheHandle | ViTHandle | None:
    """Handle of what is applied to ``model``; None if nothing is.

    Works on copies and on unpickled models too: what is applied travels with the model.

    Args:
        model: whatever :func:`apply_tome` takes.
        technique: 'tome' or 'cache'. Default None: token merging if it is applied, otherwise step
            caching.
    """
    if technique not in (None, "tome", "cache"):
        raise ToMeError(f"technique={technique!r} must be 'tome' or 'cache'; leave it out for both")
    try:
        found = _denoisers_or_vit(model, None, warn=False)
    except ToMeError:
        return None
    if not isinstance(found, list):
        from .vit import get_vit_handle

        return None if technique == "cache" else get_vit_handle(found)
    for name, kind, handle in (("tome", TomePatch, ToMeHandle), ("cache", CachePatch, CacheHandle)):
        if technique in (None, name):
            every = [*found, *_together(model, kind)]
            patches = [find_patch(one.network, kind) for one in every]
            parts = _parts([pair for pair in zip(every, patches) if pair[1] is not None])
            if parts:
                return handle(parts)
    return None


def _denoisers_or_vit(
    model: object, only: Sequence[str] | None, warn: bool = True
) -> list[Denoiser] | Any:
    """The denoisers of a model; the model itself if it is a vision transformer."""
    try:
        return find_denoisers(model, only=only, warn=warn)
    except ToMeError:
        from .vit.families import find_vit

        with contextlib.suppress(ToMeError):
            find_vit(model)
            return model
        raise


def _with_blocks(found: list[Denoiser], config: ToMeConfig) -> list[tuple]:
    """(config, denoiser, its blocks to merge); a denoiser that has none stays as it is, with a
    warning, where another one has some."""
    chosen, refused = [], []
    for one in found:
        try:
            chosen.append((config, one, blocks_to_merge(one.adapter, one.network, config)))
        except ToMeError as error:
            refused.append((one, error))
    for one, error in refused:
        if not chosen:
            raise error
        warnings.warn(f"{one.name!r} stays as it is. {error}", stacklevel=3)
    return chosen


def _parts(patched: list[tuple[Denoiser, Any]]) -> list[tuple]:
    """(beginning of names, network, patch), as handles take them."""
    return [(f"{one.name}." if one.name else "", one.network, patch) for one, patch in patched]


def _together(model: object, kind: type) -> list[Denoiser]:
    """The ControlNets to which a technique was applied together with the denoiser."""
    patches = [(one, find_patch(one.network, kind)) for one in find_controlnets(model, known=True)]
    return [one for one, patch in patches if patch is not None and patch.with_denoiser]


def _replaced(
    model: object, networks: Sequence[nn.Module], kind: type
) -> list[tuple[nn.Module, list]]:
    """Take out what is applied to networks, and to ControlNets that no longer take part; what that
    was, to be put back."""
    together = [one.network for one in _together(model, kind)]
    found = {one: find_patch(one, kind) for one in (*networks, *together)}
    return [(one, remove(one, patch)) for one, patch in found.items() if patch is not None]
