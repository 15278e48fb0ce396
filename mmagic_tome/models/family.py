# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's Stable Diffusion classes with the key ``tome_cfg``, under their own names.

Each is a subclass of MMagic's class with :class:`ToMeMixin` before it and nothing
else. Importing this module imports ``mmagic.models`` and puts them into its registry,
in the place of MMagic's under every alias. Models pickle, because their class is
found here by name.
"""

import mmagic.models  # noqa: F401  (fills the registry)
from mmagic.registry import MODELS

from .builder import build_tome
from .mixin import ToMeMixin

FAMILY = (
    "StableDiffusion",
    "StableDiffusionInpaint",
    "StableDiffusionXL",
    "ControlStableDiffusion",
    "ControlStableDiffusionImg2Img",
    "DreamBooth",
    "TextualInversion",
    "ViCo",
    "FastComposer",
    "AnimateDiff",
)

__all__ = ["FAMILY"]


def _with_tome(base):
    body = {"__module__": __name__, "__doc__": base.__doc__}
    return type(base.__name__, (ToMeMixin, base), body)


_registered = MODELS.module_dict
# All ten exist in MMagic 1.2; an earlier version may lack some.
_ours = {_registered[name]: _with_tome(_registered[name]) for name in FAMILY if name in _registered}
globals().update({ours.__name__: ours for ours in _ours.values()})

for _name, _class in list(_registered.items()):  # an alias is an entry of its own
    if _class in _ours:
        MODELS.register_module(name=_name, module=_ours[_class], force=True)
MODELS.register_module(name="ToMe", module=build_tome, force=True)
