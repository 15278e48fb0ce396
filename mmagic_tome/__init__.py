# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Faster diffusion models by merging redundant tokens, without training.

In a MMagic config::

    custom_imports = dict(imports=['mmagic_tome'])
    tome_cfg = dict(ratio=0.5)

Anywhere else::

    handle = mmagic_tome.apply_tome(pipeline_or_unet, ratio=0.5)

Importing this package makes MMagic 1.2 work on current libraries (see
:mod:`mmagic_tome.mmagic.compat`) and makes its models know ``tome_cfg`` (see
:mod:`mmagic_tome.mmagic`); neither imports MMagic itself, which need not be there.
"""

from .mmagic import compat

compat.apply()  # before anything below can import a library that needs a repair

from . import visualization
from .apis import register_config_package
from .config import ToMeConfig
from .engine import ToMeHandle, apply_tome, get_handle, remove_tome
from .errors import ToMeError
from .mmagic import build_tome, register_all
from .mmagic import hooks as engine_hooks
from .version import __version__
from .vit.registry import register_all as register_vits

register_all()
register_vits()
engine_hooks.register_all()
visualization.register_all()
register_config_package()  # `_base_ = 'mmagic_tome::...'`

__all__ = [
    "ToMeConfig",
    "ToMeError",
    "ToMeHandle",
    "__version__",
    "apply_tome",
    "build_tome",
    "compat",
    "get_handle",
    "remove_tome",
]
