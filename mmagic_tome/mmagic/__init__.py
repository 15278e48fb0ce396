# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging and step caching in the configs and runners of MMagic and mmengine.

Three ways to write it, the same in effect::

    model = dict(type='ToMe', model=dict(type='StableDiffusion', ...), tome_cfg=dict(ratio=0.5))
    model = dict(type='StableDiffusion', ..., tome_cfg=dict(ratio=0.5))
    tome_cfg = dict(ratio=0.5)  # at the top level, next to ``model`` or a ``_base_``

and ``cache_cfg='balanced'`` in the same places.

===============  ================================================================
builder.py       ``type='ToMe'``: builds the inner model, applies, returns it
family.py        the keys for MMagic's Stable Diffusion classes
entry_points.py  the top-level keys for runners, ``init_model`` and inferencers
config_keys.py   reading the keys, and what happens when there are several
entry.py         MMagic's ``tools/test.py`` and ``tools/train.py``
hooks/           hooks, loops, metrics and a data set for mmengine's runners
compat/          MMagic 1.2.0 on current libraries
===============  ================================================================

``import mmagic_tome`` does not import MMagic, which takes seconds that a user of diffusers alone
does not need: :func:`register_all` waits until something imports ``mmagic.models`` (the registry
does, before it looks up its first name) and acts right after it, and does the same for what builds
models. It imports nothing but the standard library.
"""

import functools
import importlib
import sys

from . import compat
from .compat import when_imported

__all__ = ["register_all"]

# Module of another library -> (module of this package, function to call there) once it is imported.
# With None the module registers itself: an import of ``family`` may itself have brought MMagic in,
# and then it is half done.
_ACTIONS = {
    "mmagic.models": ("mmagic.family", None),
    "mmengine.registry": ("vit.registry", "register_root"),
    "mmpretrain.registry": ("vit.registry", "register_mmpretrain"),
}
# Module of another library -> function of entry_points that patches it.
_PATCHES = {
    "mmengine.runner.runner": "patch_runner",
    "mmengine.runner._flexible_runner": "patch_flexible_runner",
    "mmagic.apis.inferencers.base_mmagic_inferencer": "patch_inferencer",
    "mmagic.apis.inferencers.controlnet_animation_inferencer": "patch_animation_inferencer",
    "mmagic.apis.inferencers.inference_functions": "patch_init_model",
}


@functools.cache
def register_all():
    """Make the package known to MMagic, mmengine and mmpretrain; again does nothing.

    What is not imported yet is registered when it is; nothing is imported here, and nothing
    happens where a library is not installed.
    """
    from . import hooks

    compat.apply()
    for name, (module, function) in _ACTIONS.items():
        when_imported(name, functools.partial(_call, module, function))
    for name, function in _PATCHES.items():
        when_imported(name, functools.partial(_call, "mmagic.entry_points", function, name))
    when_imported("mmengine.config.utils", _register_config_package)
    hooks.register_all()


def _call(module, function, patched=None):
    loaded = importlib.import_module(f"mmagic_tome.{module}")
    if function is not None:
        getattr(loaded, function)(*([] if patched is None else [sys.modules[patched]]))


def _register_config_package():
    """Let mmengine resolve ``mmagic_tome::...`` in ``_base_`` and ``get_config``.

    mmengine keeps a closed table of the packages it takes configs from. The table is meant to map
    a module to a distribution, whose recorded location is then joined with the module's name; for
    an editable installation that is a folder that does not exist. Naming a module of the package
    that is no distribution makes mmengine ask Python's import system instead, which is right in
    every kind of installation.
    """
    table = sys.modules["mmengine.config.utils"].MODULE2PACKAGE
    table.setdefault("mmagic_tome", "mmagic_tome.version")
