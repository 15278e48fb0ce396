# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging in the configs of MMagic and mmengine.

Three spellings, the same in effect::

    model = dict(type='ToMe', model=dict(type='StableDiffusion', ...), tome_cfg=dict(ratio=0.5))
    model = dict(type='StableDiffusion', ..., tome_cfg=dict(ratio=0.5))
    tome_cfg = dict(ratio=0.5)  # at the top level, beside ``model`` or a ``_base_``

===============  ================================================================
builder.py       ``type='ToMe'``: builds the inner model, applies, returns it
family.py        the key ``tome_cfg`` for MMagic's Stable Diffusion classes
entry_points.py  the top-level key for runners, ``init_model`` and inferencers
spellings.py     reading the keys, and what happens when there are several
===============  ================================================================

``import mmagic_tome`` does not import MMagic, which takes seconds that a user of
diffusers alone would pay for nothing: :func:`register_all` waits until something
imports ``mmagic.models`` (the registry does, before it looks up its first name) and
acts right after it, and does the same for what builds models.
"""

import functools
import sys

from .builder import build_tome
from .compat import when_imported

__all__ = ["build_tome", "register_all"]

_waiting = set()

_PATCHES = {
    "mmengine.runner.runner": "patch_runner",
    "mmengine.runner._flexible_runner": "patch_flexible_runner",
    "mmagic.apis.inferencers.base_mmagic_inferencer": "patch_inferencer",
    "mmagic.apis.inferencers.controlnet_animation_inferencer": "patch_animation_inferencer",
    "mmagic.apis.inferencers.inference_functions": "patch_init_model",
}


def register_all():
    """Make the three spellings work; calling it again does nothing.

    What is not imported yet is registered when it is; nothing is imported here, and
    nothing happens where MMagic or mmengine is not installed.
    """
    _when_imported("mmagic.models", _register_models)
    for module, patch in _PATCHES.items():
        _when_imported(module, functools.partial(_patch, module, patch))


def _register_models():
    # Not a name from it: when the import of ``family`` itself brought MMagic in, it is
    # half done here and registers when it gets there.
    from . import family  # noqa: F401


def _patch(module, patch):
    from . import entry_points

    getattr(entry_points, patch)(sys.modules[module])


def _when_imported(module, action):
    if module not in _waiting:
        _waiting.add(module)
        when_imported(module, action)
