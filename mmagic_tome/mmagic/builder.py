# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``type='ToMe'``: any model of a config, with token merging and step caching."""

from torch import nn

from ..errors import ToMeError
from .config_keys import apply_model_level, read, read_model_level, translate_tomesd

__all__ = ["build_tome"]

# Keys that mmengine and MMagic put into, or look for in, the outermost model config:
# they are meant for the model, so that is where they go.
_FOR_THE_MODEL = ("data_preprocessor", "init_cfg")
# Options of vision transformers alone.
_FOR_VITS = ("r", "target_speedup")


def build_tome(model, tome_cfg=None, cache_cfg=None, **others):
    """Build a model and apply token merging and step caching to it.

    Registered as ``'ToMe'`` in MMagic's ``MODELS``. It is a function, not a class:
    what it returns *is* the inner model, so ``isinstance``, ``state_dict`` keys and
    every method stay what they are::

        model = dict(
            type='ToMe',
            model=dict(type='StableDiffusion', ...),
            tome_cfg=dict(ratio=0.5),
            cache_cfg='balanced')

    Args:
        model (dict | nn.Module): Config of the inner model, or a model.
        tome_cfg (dict | ToMeConfig, optional): Options of :class:`mmagic_tome.ToMeConfig`.
            Default: None, nothing is merged.
        cache_cfg (str | dict | list, optional): Named setting or options of
            :class:`mmagic_tome.StepCacheConfig`. Default: None, nothing is skipped.
        **others: ``data_preprocessor`` and ``init_cfg`` are passed on to the inner
            model unless it has its own. With ``r`` or ``target_speedup`` the model is a vision
            transformer, and all are options of :func:`mmagic_tome.vit.apply_tome_vit`.
            Nothing else is accepted.

    Returns:
        nn.Module: The inner model.

    Raises:
        ToMeError: Before anything is built, for an invalid value, an unknown key, or
            another ``tome_cfg`` or ``cache_cfg`` in the inner config; afterwards if there
            is nothing to merge or skip in the model.
        ImportError: MMagic is not installed.
    """
    if tome_cfg is None and cache_cfg is None and any(key in others for key in _FOR_VITS):
        from ..vit.registry import merging_builder

        return merging_builder(_registry())(model, **others)
    for key in others:
        if key not in _FOR_THE_MODEL:
            raise ToMeError(
                f"type='ToMe' does not know {key!r}: options of token merging go into "
                "tome_cfg=dict(...), those of step caching into cache_cfg, those of the model into "
                "model=dict(...)"
            )
    if isinstance(model, nn.Module):
        apply_model_level(model, *read_model_level(tome_cfg, cache_cfg))
        return model
    if not isinstance(model, dict) or "type" not in model:
        raise ToMeError(
            "type='ToMe' needs the model to build, as in "
            f"model=dict(type='ToMe', model=dict(type='StableDiffusion', ...)); got {model!r}"
        )
    inner = dict(model)
    # Taken out here, so that the keys work for a model that does not know them.
    tome_places = {
        "tome_cfg": tome_cfg,
        "tome_cfg of the inner model": inner.pop("tome_cfg", None),
        "tomesd_cfg": translate_tomesd(inner.pop("tomesd_cfg", None)),
    }
    cache_places = {
        "cache_cfg": cache_cfg,
        "cache_cfg of the inner model": inner.pop("cache_cfg", None),
    }
    configs = read("tome_cfg", **tome_places), read("cache_cfg", **cache_places)
    for key, value in others.items():
        if inner.get(key) is None:
            inner[key] = value
    built = _registry().build(inner)
    apply_model_level(built, *configs)
    return built


def _registry():
    try:
        from mmagic.registry import MODELS
    except ModuleNotFoundError as error:
        raise ImportError(f"this needs MMagic ({error}): pip install mmagic==1.2.0") from error
    return MODELS
