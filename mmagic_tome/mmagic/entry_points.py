# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Top-level ``tome_cfg`` and ``cache_cfg`` where a model is built from a part of a config.

mmengine's runners, MMagic's ``init_model`` and its inferencers know the whole config;
the model never sees the rest. Of the ways to bring the two together in a runner, a hook
would have to be named in every config (mmengine adds none by itself) and would come
after the model was wrapped for distributed training. So each is patched around its
build, for models of any kind: what cannot be merged raises, and a mistake shows before
minutes of loading weights. A config without the key passes through unchanged.
"""

import functools
import sys

from .spellings import apply_top_level, read_top_level

__all__ = [
    "patch_animation_inferencer",
    "patch_flexible_runner",
    "patch_inferencer",
    "patch_init_model",
    "patch_runner",
]


def patch_runner(module):
    """Let ``Runner.build_model`` apply both keys of the runner's config.

    It is on every path (``from_cfg``, the constructor, a model given as an object).
    """

    def around(build_model):
        def build_and_apply(self, model):
            read_top_level(self.cfg)
            built = build_model(self, model)
            apply_top_level(built, self.cfg)
            return built

        return build_and_apply

    _replace(module.Runner, "build_model", around)


def patch_flexible_runner(module):
    """The same for ``FlexibleRunner``, which leaves building, later, to its strategy."""

    def around(init):
        def init_and_watch(self, *args, **kwargs):
            init(self, *args, **kwargs)
            read_top_level(self.cfg)
            build_model = self.strategy.build_model

            def build_and_apply(model):
                built = build_model(model)
                apply_top_level(built, self.cfg)
                return built

            self.strategy.build_model = build_and_apply

        return init_and_watch

    _replace(module.FlexibleRunner, "__init__", around)


def patch_inferencer(module):
    """Let MMagic's inferencers apply both keys of their config."""

    def around(init_model):
        def init_and_apply(self, cfg, *args, **kwargs):
            read_top_level(cfg)
            model = init_model(self, cfg, *args, **kwargs)
            apply_top_level(model, cfg)
            return model

        return init_and_apply

    _replace(module.BaseMMagicInferencer, "_init_model", around)


def patch_animation_inferencer(module):
    """The same for the inferencer of ControlNet animation, which has a way of its own.

    It reads its config, builds the model and keeps nothing but the model.
    """

    def around(init):
        def init_and_apply(self, config, *args, **kwargs):
            whole = module.Config.fromfile(config)
            read_top_level(whole)
            init(self, config, *args, **kwargs)
            apply_top_level(self.pipe, whole)

        return init_and_apply

    _replace(module.ControlnetAnimationInferencer, "__init__", around)


def patch_init_model(module):
    """Let MMagic's ``init_model`` apply both keys of its config.

    Who imported the function before this package has the unpatched one, which works for
    the Stable Diffusion family, by ``cfg`` (see ``family.py``).
    """

    def around(init_model):
        def init_and_apply(config, *args, **kwargs):
            if isinstance(config, str):
                config = module.Config.fromfile(config)
            read_top_level(config)
            model = init_model(config, *args, **kwargs)
            apply_top_level(model, config)
            return model

        return init_and_apply

    _replace(module, "init_model", around)
    if "mmagic.apis" in sys.modules:  # has it by name
        sys.modules["mmagic.apis"].init_model = module.init_model


def _replace(owner, name, around):
    function = getattr(owner, name)
    if not getattr(function, "applies_keys", False):
        replacement = functools.wraps(function)(around(function))
        replacement.applies_keys = True
        setattr(owner, name, replacement)
