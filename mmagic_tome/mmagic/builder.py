# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``type='ToMe'``: any model of a config, with token merging and step caching."""

from torch import nn

from ..errors import ToMeError
from .config_keys import apply_keys, read_keys

# Keys that mmengine and MMagic put into, or look for in, the outermost model config.
_FOR_THE_MODEL = ("data_preprocessor", "init_cfg")
# Options of vision transformers alone.
_FOR_VITS = ("r", "target_speedup")


def build_tome(model, tome_cfg=None, cache_cfg=None, **others):
    """Build a model and apply token merging and step caching to it: ``'ToMe'`` in MMagic's
    ``MODELS``.

    What it returns *is* the inner model, so ``isinstance``, ``state_dict`` keys and every method
    stay what they are::

        model = dict(type='ToMe', model=dict(type='StableDiffusion', ...), cache_cfg='balanced')

    Args:
        model (dict | nn.Module): Config of the inner model, or a model.
        tome_cfg (dict | ToMeConfig, optional): Options of :class:`mmagic_tome.ToMeConfig`.
            Default: None, nothing is merged.
        cache_cfg (str | dict | list, optional): Named setting or options of
            :class:`mmagic_tome.StepCacheConfig`. Default: None, nothing is skipped.
        **others: ``data_preprocessor`` and ``init_cfg`` of the inner model, unless it has its own;
            or, with ``r`` or ``target_speedup``, options of
            :func:`mmagic_tome.vit.apply_tome_vit`.

    Raises:
        ToMeError: Before anything is built, for an invalid value or an unknown key; afterwards
            for another ``tome_cfg`` or ``cache_cfg`` in the inner config, or if there is nothing
            to merge or skip in the model.
    """
    if tome_cfg is None and cache_cfg is None and any(key in others for key in _FOR_VITS):
        from mmagic.registry import MODELS

        from ..vit.registry import merging_builder

        return merging_builder(MODELS)(model, **others)
    for key in others:
        if key not in _FOR_THE_MODEL:
            raise ToMeError(
                f"type='ToMe' does not know {key!r}: options of token merging go into "
                "tome_cfg=dict(...), those of step caching into cache_cfg, those of the model into "
                "model=dict(...)"
            )
    configs = read_keys({"tome_cfg": tome_cfg, "cache_cfg": cache_cfg})
    if not isinstance(model, nn.Module):
        if not isinstance(model, dict) or "type" not in model:
            raise ToMeError(
                "type='ToMe' needs the model to build, as in "
                f"model=dict(type='ToMe', model=dict(type='StableDiffusion', ...)); got {model!r}"
            )
        from mmagic.registry import MODELS

        inner = dict(model)
        for key, value in others.items():
            if inner.get(key) is None:
                inner[key] = value
        model = MODELS.build(inner)
    apply_keys(model, configs)
    return model
