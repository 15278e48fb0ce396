# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Top-level ``tome_cfg`` and ``cache_cfg`` where a model is built from a part of a config.

mmengine's Runner, MMagic's ``init_model`` and its inferencers read the whole config; the model
receives only a part of it. A hook in a runner would come after the model was wrapped for
distributed training. So each is patched around its build, for models of any kind: what cannot be
merged raises, and a mistake shows before minutes of loading weights.
"""

import functools
import sys

from .config_keys import apply_keys, read_keys


def patch_runner():
    """``Runner.build_model``, which is on every path: ``from_cfg``, the constructor, a model given
    as an object."""
    from mmengine.runner.runner import Runner

    _patch(Runner, "build_model", lambda self, *_, **__: self.cfg)


def patch_inferencer():
    """MMagic's inferencers."""
    from mmagic.apis.inferencers.base_mmagic_inferencer import BaseMMagicInferencer

    _patch(BaseMMagicInferencer, "_init_model", lambda self, cfg, *_, **__: cfg)


def patch_animation():
    """The inferencer of ControlNet animation, which reads its config and keeps only the model."""
    from mmagic.apis.inferencers import controlnet_animation_inferencer as module

    _patch(
        module.ControlnetAnimationInferencer,
        "__init__",
        lambda self, config, *_, **__: module.Config.fromfile(config),
        model_of=lambda result, self, *_: self.pipe,
    )


def patch_init_model():
    """MMagic's ``init_model``.

    An ``init_model`` that was imported by name earlier is not patched; it works for the Stable
    Diffusion family, whose models apply the config that it assigns to ``cfg`` (see ``family.py``).
    """
    from mmagic.apis.inferencers import inference_functions as module

    def config_of(config, *_, **__):
        return module.Config.fromfile(config) if isinstance(config, str) else config

    _patch(module, "init_model", config_of)
    if "mmagic.apis" in sys.modules:  # has it by name
        sys.modules["mmagic.apis"].init_model = module.init_model


def _patch(owner, name, config_of, model_of=lambda result, *_: result):
    """Let the function ``owner.name``, which builds a model, apply the keys of the config that
    ``config_of`` returns for its arguments to the model that ``model_of`` returns for its result
    and arguments."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def build_and_apply(*args, **kwargs):
        configs = read_keys(config_of(*args, **kwargs))  # mistakes show before anything is built
        result = function(*args, **kwargs)
        apply_keys(model_of(result, *args), configs, top_level=True)
        return result

    setattr(owner, name, build_and_apply)
