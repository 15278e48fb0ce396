# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers in configs: ``type='ToMe'`` around a backbone, and models to wrap in it.

In a config of mmpretrain::

    custom_imports = dict(imports=["mmagic_tome"])
    model = dict(
        type="ImageClassifier",
        backbone=dict(type="ToMe", model=dict(type="VisionTransformer", arch="base"), r=13),
        ...)

Without mmpretrain, in mmengine's root registry::

    model = dict(type="ToMe", model=dict(type="TimmModel", name="vit_small_patch16_224"), r=13)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ToMeError


def merging_builder(registry: Any) -> Callable[..., nn.Module]:
    """The function behind ``type='ToMe'`` of a registry, which takes ``model``, a config of that
    registry or a module, and the options of :func:`~.apply.apply_tome_vit`, and returns the model
    itself."""

    def build_tome_vit(model: Any, **options: Any) -> nn.Module:
        from .apply import apply_tome_vit

        if not isinstance(model, nn.Module):
            if not isinstance(model, dict) or "type" not in model:
                raise ToMeError(
                    "type='ToMe' needs the model to build, as in dict(type='ToMe', "
                    f"model=dict(type='VisionTransformer', ...), r=13); got {model!r}"
                )
            model = registry.build(model)
        # YAML and JSON have no tuples: [8, -1.0] can only be (r, inflect).
        r = options.get("r")
        if isinstance(r, list) and len(r) == 2 and isinstance(r[1], float):
            options["r"] = tuple(r)
        apply_tome_vit(model, options)
        return model

    return build_tome_vit


def timm_model(name: str, **options: Any) -> nn.Module:
    """``type='TimmModel'``: ``timm.create_model(name, **options)`` in eval mode; random weights
    unless ``pretrained=True``."""
    import timm

    return timm.create_model(name, **options).eval()


def transformers_model(model: str, config: str, **options: Any) -> nn.Module:
    """``type='TransformersModel'``: a model with random weights, in eval mode, from the name of its
    class, such as 'VideoMAEForVideoClassification', that of its config's, and options of the
    config."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def register_root() -> None:
    """Register all names with mmengine's root registry."""
    from mmengine.registry import MODELS

    MODELS.register_module(name="TimmModel", module=timm_model, force=True)
    MODELS.register_module(name="TransformersModel", module=transformers_model, force=True)
    MODELS.register_module(name="ToMe", module=merging_builder(MODELS), force=True)


def register_mmpretrain() -> None:
    """Register ``'ToMe'`` with mmpretrain."""
    from mmpretrain.registry import MODELS

    MODELS.register_module(name="ToMe", module=merging_builder(MODELS), force=True)
