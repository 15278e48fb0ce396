# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``type='ToMe'``: any model of a config, with token merging."""

from torch import nn

from ..errors import ToMeError
from ..vit.registry import merging_builder
from .spellings import apply_model_level, read

__all__ = ["build_tome"]

# Keys that mmengine and MMagic put into, or look for in, the outermost model config:
# they are meant for the model, so that is where they go.
_FOR_THE_MODEL = ("data_preprocessor", "init_cfg")
# Who names one of these means a vision transformer.
_FOR_VITS = ("r", "target_speedup")


def build_tome(model, tome_cfg=None, **others):
    """Build a model and apply token merging to it.

    Registered as ``'ToMe'`` in MMagic's ``MODELS``. It is a function, not a class:
    what it returns *is* the inner model, so ``isinstance``, ``state_dict`` keys and
    every method stay what they are::

        model = dict(
            type='ToMe',
            model=dict(type='StableDiffusion', ...),
            tome_cfg=dict(ratio=0.5))

    Args:
        model (dict | nn.Module): Config of the inner model, or a model.
        tome_cfg (dict | ToMeConfig, optional): Options of :class:`mmagic_tome.ToMeConfig`.
            Default: None, the model is left as it is.
        **others: ``data_preprocessor`` and ``init_cfg`` are passed on to the inner
            model unless it has its own. With ``r`` or ``target_speedup`` the model is a vision
            transformer, and all are options of :func:`mmagic_tome.vit.apply_tome_vit`.
            Nothing else is accepted.

    Returns:
        nn.Module: The inner model.

    Raises:
        ToMeError: Before anything is built, for an invalid value, an unknown key, or
            another ``tome_cfg`` in the inner config; afterwards if there is nothing
            to merge in the model.
        ImportError: MMagic is not installed.
    """
    if tome_cfg is None and any(key in others for key in _FOR_VITS):
        return merging_builder(_registry())(model, **others)
    for key in others:
        if key not in _FOR_THE_MODEL:
            raise ToMeError(
                f"type='ToMe' does not know {key!r}: options of token merging go into "
                f"tome_cfg=dict(...), options of the model into model=dict(...)"
            )
    if isinstance(model, nn.Module):
        apply_model_level(model, read(tome_cfg=tome_cfg))
        return model
    if not isinstance(model, dict) or "type" not in model:
        raise ToMeError(
            "type='ToMe' needs the model to build, as in "
            f"model=dict(type='ToMe', model=dict(type='StableDiffusion', ...)); got {model!r}"
        )
    inner = dict(model)
    config = read(
        tome_cfg=tome_cfg,
        **{
            # Taken out here, so that it works for a model that does not know the key.
            "tome_cfg of the inner model": inner.pop("tome_cfg", None),
            "tomesd_cfg": inner.pop("tomesd_cfg", None),
        },
    )
    for key, value in others.items():
        if inner.get(key) is None:
            inner[key] = value
    built = _registry().build(inner)
    apply_model_level(built, config)
    return built


def _registry():
    try:
        from mmagic.registry import MODELS
    except ModuleNotFoundError as error:
        if error.name != "mmagic":
            raise
        raise ImportError(
            "building a model from a MMagic config needs MMagic: pip install mmagic==1.2.0 "
            "(apply_tome itself works on diffusers models without it)"
        ) from error
    return MODELS
