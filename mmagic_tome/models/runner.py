# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A top-level ``tome_cfg`` for mmengine's Runner.

A Runner knows the whole config and builds the model from a part of it; the model
never sees the rest. Of the ways to bring the two together, a hook would have to be
named in every config (mmengine adds none by itself) and would come after the model was
wrapped for distributed training; so ``Runner.build_model`` is the place: one method, on
every path (``from_cfg``, the constructor, a model given as an object), right after the
build, and a config without the key passes through unchanged.
"""

import functools

from mmengine.runner.runner import Runner

from .spellings import apply_top_level, read_top_level

__all__ = ["patch_runner"]


def patch_runner():
    """Let ``Runner.build_model`` apply ``tome_cfg`` of the runner's config."""
    build_model = Runner.build_model
    if getattr(build_model, "applies_tome_cfg", False):
        return

    @functools.wraps(build_model)
    def build_model_and_apply(self, model):
        read_top_level(self.cfg)  # a mistake shows before minutes of loading weights
        built = build_model(self, model)
        apply_top_level(built, self.cfg)
        return built

    build_model_and_apply.applies_tome_cfg = True
    Runner.build_model = build_model_and_apply
