# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The keys ``tome_cfg`` and ``cache_cfg`` for MMagic's Stable Diffusion classes and subclasses.

The classes themselves are changed, not replaced by subclasses in the registry: a class
of a user's own, ``type=`` with a class object, ``isinstance`` and pickle then need no
care at all. What they gain:

- the argument ``tome_cfg`` (dict | ToMeConfig; default None, the model is left as it
  is), and ``tomesd_cfg``, MMagic's own key, means the same: MMagic's implementation of
  it fails on every current diffusers UNet, and is never run. A wrong value raises
  ToMeError before anything is built;
- ``set_tomesd()``, by this package's engine;
- the argument ``cache_cfg`` (str | dict | list; default None) for step caching;
- ``tome_handle`` and ``cache_handle``: the handles in force, or None;
- ``cfg``: assigning a whole config with one of the keys at its top level applies it. MMagic's
  ``init_model`` and inferencers leave their config there.

Importing this module imports ``mmagic.models``.
"""

import functools
import inspect

from mmagic import models
from mmagic.registry import MODELS

from ..apply import apply_tome, get_handle
from .builder import build_tome
from .config_keys import KEYS, apply_keys, read_keys, translate_tomesd

# In the ``__dict__`` of a model while its ``__init__`` runs; what it was given so far.
_BUILDING = "_tome_building"


def patch(root):
    """Give a class of modules and its subclasses, also those to come, what is listed above."""

    def __init_subclass__(cls, **kwargs):
        super(root, cls).__init_subclass__(**kwargs)
        _wrap_init(cls)

    root.__init_subclass__ = classmethod(__init_subclass__)
    root.set_tomesd = _set_tomesd
    root.tome_handle = property(
        lambda self: get_handle(self, "tome"), doc="ToMeHandle | None: the token merging in force."
    )
    root.cache_handle = property(
        lambda self: get_handle(self, "cache"), doc="CacheHandle | None: the step caching in force."
    )
    root.cfg = property(_get_cfg, _set_cfg, doc="The whole config; its keys are applied.")
    classes = [root]
    while classes:
        cls = classes.pop()
        _wrap_init(cls)
        classes += cls.__subclasses__()


def _wrap_init(cls):
    """Let ``cls.__init__`` take the keys. The outermost ``__init__`` of a model applies them: only
    after it is the UNet the one that will run (FastComposer replaces it, ViCo its transformers)."""
    init = vars(cls).get("__init__")
    if not inspect.isfunction(init) or hasattr(init, "takes_mmagic_tome"):
        return
    parameters = inspect.signature(init).parameters
    any_name = any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        given = {key: kwargs.get(key) for key in KEYS}
        outermost = _BUILDING not in self.__dict__
        if outermost:
            read_keys(kwargs)
            self.__dict__[_BUILDING] = {}
        for key in KEYS:
            # It may have a default for it, or an opinion, before it hands it to its base.
            if key in kwargs and not (any_name or key in parameters):
                del kwargs[key]
                self.__dict__[_BUILDING].setdefault(key, given[key])
        init(self, *args, **kwargs)
        if outermost:
            _complete(self, {**given, **self.__dict__.pop(_BUILDING)})

    __init__.takes_mmagic_tome = True
    cls.__init__ = __init__


def _complete(model, given):
    # A positional ``tomesd_cfg`` shows only now.
    apply_keys(model, read_keys({**given, "tomesd_cfg": getattr(model, "tomesd_cfg", None)}))
    apply_keys(model, read_keys(model.__dict__.get("cfg")), top_level=True)


def _set_tomesd(self):
    """Apply ``self.tomesd_cfg``; not yet in the middle of ``__init__``, where MMagic calls it."""
    if _BUILDING not in self.__dict__ and self.tomesd_cfg is not None:
        apply_tome(self, translate_tomesd(self.tomesd_cfg))


def _get_cfg(self):
    try:
        return self.__dict__["cfg"]
    except KeyError:
        raise AttributeError("cfg") from None  # as if there were no property


def _set_cfg(self, cfg):
    self.__dict__["cfg"] = cfg
    if _BUILDING not in self.__dict__:
        apply_keys(self, read_keys(cfg), top_level=True)


for _root in (models.StableDiffusion, models.StableDiffusionXL, models.AnimateDiff):
    patch(_root)  # the others of the family inherit from StableDiffusion
MODELS.register_module(name="ToMe", module=build_tome, force=True)
