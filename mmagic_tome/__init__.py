# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Faster diffusion models and vision transformers, without training.

Token merging makes redundant tokens one; step caching skips network calls whose output can be
extrapolated from previous steps. In a MMagic config::

    custom_imports = dict(imports=['mmagic_tome'])
    tome_cfg = dict(ratio=0.5)      # token merging
    cache_cfg = 'balanced'          # step caching

Anywhere else::

    mmagic_tome.apply_tome(pipeline, ratio=0.5)
    mmagic_tome.apply_cache(pipeline, 'balanced')

Importing this package imports torch at most when one of its names is used. Where MMagic is
installed, it makes MMagic 1.2 work on current libraries (:mod:`mmagic_tome.mmagic.compat`) and its
configs know both keys, as soon as somebody imports MMagic.
"""

import importlib
import importlib.util

from .version import __version__

# Name -> the module that defines it.
_NAMES = {
    "CacheHandle": "handle",
    "StepCacheConfig": "cache",
    "ToMeConfig": "config",
    "ToMeError": "errors",
    "ToMeHandle": "handle",
    "ViTHandle": "vit",
    "apply_cache": "apply",
    "apply_tome": "apply",
    "build_tome": "mmagic.builder",
    "get_handle": "apply",
    "remove_cache": "apply",
    "remove_tome": "apply",
}

_SUBPACKAGES = ("cache", "merging", "methods", "mmagic", "models", "vit")

__all__ = [*sorted(_NAMES), "__version__", "compat"]


def __getattr__(name):
    if name == "compat":
        return importlib.import_module(".mmagic.compat", __name__)
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


def _connect():
    """Make MMagic and its relatives know this package, where one of them is installed."""
    # torchvision: a wheel for CUDA beside a torch for CPUs does not import without a repair.
    for library in ("mmengine", "mmagic", "mmpretrain", "torchvision"):
        if importlib.util.find_spec(library) is not None:
            importlib.import_module(".mmagic", __name__).register_all()
            return


_connect()
