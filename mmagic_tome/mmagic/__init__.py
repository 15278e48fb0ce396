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
hooks/           a hook, loops, metrics and a data set for mmengine's Runner
compat/          MMagic 1.2.0 on current libraries
===============  ================================================================

``import mmagic_tome`` does not import MMagic, which takes seconds: :func:`register_all` waits until
something imports ``mmagic.models`` (the registry does, before it looks up its first name) and acts
right after it. It imports nothing but the standard library.
"""

import functools
import importlib
import sys

from . import compat
from .compat import when_imported

_INFERENCERS = "mmagic.apis.inferencers"

# Module of another library, module of this package that is imported right after it, function of
# that module to call then; with None its import registers it.
_ACTIONS = (
    ("mmagic.models", "mmagic.family", None),
    ("mmengine.hooks", "mmagic.hooks.tome", None),
    ("mmengine.runner.loops", "mmagic.hooks.loops", None),
    ("mmengine.runner.loops", "mmagic.hooks.prompts", None),
    ("mmengine.evaluator", "mmagic.hooks.metrics", None),
    ("mmengine.runner.runner", "mmagic.entry_points", "patch_runner"),
    (f"{_INFERENCERS}.base_mmagic_inferencer", "mmagic.entry_points", "patch_inferencer"),
    (f"{_INFERENCERS}.controlnet_animation_inferencer", "mmagic.entry_points", "patch_animation"),
    (f"{_INFERENCERS}.inference_functions", "mmagic.entry_points", "patch_init_model"),
    ("mmengine.registry", "vit.registry", "register_root"),
    ("mmpretrain.registry", "vit.registry", "register_mmpretrain"),
    ("mmengine.config.utils", "mmagic", "register_config_package"),
)


@functools.cache
def register_all():
    """Make the package known to MMagic, mmengine and mmpretrain; again does nothing.

    What is not imported yet is registered when it is; nothing is imported here, and nothing
    happens where a library is not installed.
    """
    compat.apply()
    for library, module, function in _ACTIONS:
        when_imported(library, functools.partial(_act, module, function))


def _act(module, function):
    loaded = importlib.import_module(f"mmagic_tome.{module}")
    if function is not None:
        getattr(loaded, function)()


def register_config_package():
    """Let mmengine resolve ``mmagic_tome::...`` in ``_base_`` and ``get_config``.

    Its table maps a module to a distribution, whose recorded location is wrong for an editable
    installation. For the name of a module that is no distribution mmengine asks Python's import
    system instead, which is right in every kind of installation.
    """
    table = sys.modules["mmengine.config.utils"].MODULE2PACKAGE
    table.setdefault("mmagic_tome", "mmagic_tome.version")
