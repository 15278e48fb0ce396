# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runners: a MMagic model or a diffusers pipeline; request in, images and times out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ToMeError
from ..request import Request
from .base import Output, Runner, Source

__all__ = ["Output", "Runner", "Source", "open_source", "runner_of"]


def open_source(
    config: Any = None,
    checkpoint: str | Path | None = None,
    pipeline: str | Path | None = None,
    cfg_options: Mapping[str, Any] | None = None,
) -> Source:
    """What is to be run: a config (and a checkpoint), or a pipeline. No weights are loaded.

    Args:
        config: File, ``'mmagic_tome::demo/sd-emoji.py'`` (a config of an installed package), or
            mmengine's ``Config``. It has ``model=dict(...)`` of MMagic, or a diffusers pipeline as
            ``pipeline=dict(from_pretrained=FOLDER_OR_ID)``, with its class as ``type`` where the
            folder's own is not meant, and with further arguments of ``from_pretrained``.
        checkpoint: Weights for a MMagic model. Default: None, the config's ``load_from``.
        pipeline: Folder in diffusers layout, or an id on the hub; in place of a config.
        cfg_options: Entries of the config to override, as ``{'tome_cfg.ratio': 0.7}``.

    Raises:
        ToMeError: Both a config and a pipeline, or neither; a file that is not there; whatever is
            wrong with the config or the pipeline.
    """
    if (config is None) == (pipeline is None):
        raise ToMeError("state either a config or a pipeline (--pipeline FOLDER_OR_ID)")
    if pipeline is not None:
        if checkpoint is not None or cfg_options:
            raise ToMeError("a pipeline has no checkpoint and no --cfg-options; a config has")
        from .pipelines import PipelineSource

        return PipelineSource(pipeline)
    written = str(config) if isinstance(config, (str, Path)) else config.filename
    if isinstance(config, (str, Path)):
        from .mmagic_source import load_config

        config = load_config(config)
    config.merge_from_dict(dict(cfg_options or {}))
    # MMagic's configs for training call their list of data transforms "pipeline".
    if config.get("pipeline") is None or isinstance(config.pipeline, (list, tuple)):
        from .mmagic_source import MMagicSource

        source = MMagicSource(config, checkpoint=checkpoint)
    elif config.get("model") is not None:
        raise ToMeError(f"config {written} has a model and a pipeline; keep one")
    elif checkpoint is not None:
        raise ToMeError("a pipeline loads its own weights; leave out the checkpoint")
    else:
        source = _pipeline_source(config)
    source.path = written or source.path
    return source


def _pipeline_source(config: Any) -> Source:
    from .pipelines import PipelineSource

    options = dict(config.pipeline) if isinstance(config.pipeline, Mapping) else {}
    path = options.pop("from_pretrained", None)
    if not isinstance(path, str):
        raise ToMeError(f"config {config.filename}: write pipeline=dict(from_pretrained=FOLDER)")
    return PipelineSource(path, options.pop("type", None), config, options)


def runner_of(model: Any, request: Request, source: Source | None = None) -> Runner:
    """A runner around a model that is there already, and stays as it is: one of MMagic's Stable
    Diffusion family, or a diffusers pipeline. ToMeError: neither; it cannot serve the request."""
    if callable(getattr(model, "infer", None)):
        from .mmagic import MMagicRunner

        return MMagicRunner(model, request, source)
    from diffusers import DiffusionPipeline

    if not isinstance(model, DiffusionPipeline):
        raise ToMeError(
            f"cannot generate with a {type(model).__name__}; pass a diffusers pipeline, or a "
            "MMagic model with infer(prompt=...)"
        )
    from .pipelines import PipelineRunner

    return PipelineRunner(model, request, source)
