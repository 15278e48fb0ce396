# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runners: a MMagic model or a diffusers pipeline; request in, images and times out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import ToMeError
from ...validate import check_integer, check_keys, check_number, fail
from ..request import INPUTS, Request
from .base import Output, Runner, Source
from .media import frame_strip, load_image, save_media

__all__ = [
    "Output",
    "Runner",
    "Source",
    "frame_strip",
    "load_image",
    "make_request",
    "open_source",
    "runner_of",
    "save_media",
]


def open_source(
    config: Any = None,
    checkpoint: str | Path | None = None,
    pipeline: str | Path | None = None,
    cfg_options: Sequence[str] | Mapping[str, Any] = (),
) -> Source:
    """What is to be run: a config (and a checkpoint), or a pipeline. No weights are loaded.

    Args:
        config: File, ``'mmagic_tome::demo/sd-emoji.py'`` (a config of an installed package), or
            mmengine's ``Config``. It has ``model=dict(...)`` of MMagic, or a diffusers pipeline as
            ``pipeline=dict(from_pretrained=FOLDER_OR_ID)``, with its class as ``type`` where the
            folder's own is not meant, and with further arguments of ``from_pretrained``.
        checkpoint: Weights for a MMagic model. Default: None, the config's ``load_from``.
        pipeline: Folder in diffusers layout, or an id on the hub; in place of a config.
        cfg_options: Entries of the config to override, as ``'tome_cfg.ratio=0.7'`` or
            ``{'tome_cfg.ratio': 0.7}``.

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
    config = _read_config(config, cfg_options)
    if config.get("pipeline") is None:
        _check_checkpoint(checkpoint or config.get("load_from"))
        from .mmagic import MMagicSource

        source = MMagicSource(config, checkpoint=checkpoint)
    elif config.get("model") is not None:
        raise ToMeError(f"config {written} has a model and a pipeline; keep one")
    elif checkpoint is not None:
        raise ToMeError("a pipeline loads its own weights; leave out the checkpoint")
    else:
        source = _pipeline_source(config)
    source.path = written or source.path
    return source


def _read_config(config: Any, options: Sequence[str] | Mapping[str, Any]) -> Any:
    texts = () if isinstance(options, Mapping) else options
    if isinstance(config, (str, Path)):
        from .mmagic_source import load_config

        config = load_config(config, texts)
    elif texts:
        raise ToMeError("state the overrides of a Config as a dict")
    if isinstance(options, Mapping) and options:
        config.merge_from_dict(dict(options))
    return config


def _check_checkpoint(checkpoint: Any) -> None:
    # mmengine downloads what is an address.
    local = checkpoint is not None and "://" not in str(checkpoint)
    if local and not Path(checkpoint).expanduser().is_file():
        raise ToMeError(f"checkpoint {checkpoint} is not there")


def _pipeline_source(config: Any) -> Source:
    from ...mmagic.config_keys import read_top_level
    from ...settings import Setting
    from .pipelines import PipelineSource

    options = dict(config.pipeline) if isinstance(config.pipeline, Mapping) else {}
    path = options.pop("from_pretrained", None)
    if not isinstance(path, str):
        raise ToMeError(f"config {config.filename}: write pipeline=dict(from_pretrained=FOLDER)")
    found = read_top_level(config)
    return PipelineSource(
        path,
        type=options.pop("type", None),
        setting=Setting(found.get("tome_cfg"), found.get("cache_cfg")),
        defaults=config.get("infer_cfg"),
        evaluation=config.get("evaluation"),
        name=Path(config.filename or path).stem,
        options=options,
    )


def runner_of(model: Any, request: Request, source: Source | None = None) -> Runner:
    """A runner around a model that is there already, and stays as it is.

    Args:
        model: A MMagic model of the Stable Diffusion family, or a diffusers pipeline.
        request: What to generate.
        source: What the model was loaded from. Default: None.

    Raises:
        ToMeError: It is neither; it cannot serve the request.
    """
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


# --- requests -------------------------------------------------------------------------------------


def make_request(source: Source, **given: Any) -> Request:
    """What to generate: what is given, else what the config says, else the defaults.

    Args:
        source: Its ``defaults`` are the config's ``infer_cfg``.
        **given: Fields of :class:`Request`; None and empty lists are as if not given. ``extra`` is
            merged with the config's, key by key.

    Raises:
        ToMeError: An unknown field, a value out of range, no prompt, or lists that do not have one
            entry for each prompt.
    """
    known = [field.name for field in fields(Request)]
    values: dict[str, Any] = {}
    for what, entries in (("infer_cfg of the config", source.defaults), ("a request", given)):
        check_keys(what, entries, known)
        where = "" if entries is given else f"{what}: "
        for key, value in entries.items():
            if value is None or (isinstance(value, (list, tuple)) and not value):
                continue
            value = _CHECKS[key](where, key, value)
            if key == "extra":
                value = {**values.get(key, {}), **value}
            values[key] = value
    if "prompts" not in values:
        raise ToMeError("no prompt: state at least one, or infer_cfg=dict(prompts=...) in a config")
    request = Request(**values)
    _check_lengths(request)
    return request


def _check_lengths(request: Request) -> None:
    for key in ("seed", "negative_prompt", *INPUTS):
        value = getattr(request, key)
        if not isinstance(value, tuple) or not value:
            continue
        if len(value) != len(request) and not (key in INPUTS and len(value) == 1):
            raise ToMeError(
                f"{key} has {len(value)} entries for {len(request)} prompts; state one for all, or "
                "one for each"
            )


def _integer(low: int, high: int | None = None) -> Callable[[str, str, Any], int]:
    return lambda where, key, value: check_integer(where, key, value, low, high)


def _guidance(where: str, key: str, value: Any) -> float:
    return float(check_number(where, key, value, 0, math.inf))


def _seed(where: str, key: str, value: Any) -> int | tuple[int, ...]:
    # torch takes more, but its generator on the CPU looks at 32 bits only, as numpy's does.
    one = _integer(0, 2**32 - 1)
    if isinstance(value, (list, tuple)):
        return tuple(one(where, key, seed) for seed in value)
    return one(where, key, value)


def _size(where: str, key: str, value: Any) -> tuple[int, int]:
    sides = value
    if isinstance(value, str):
        sides = [int(side) if side.isdecimal() else side for side in value.lower().split("x")]
    elif not isinstance(value, (list, tuple)):
        sides = [value]
    if len(sides) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in sides):
        fail(where, key, value, "height and width in pixels", (512, 512))
    return sides[0], sides[-1]


def _prompts(where: str, key: str, value: Any) -> tuple[str, ...]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, (list, tuple)):
        fail(where, key, value, "a text or a list of texts", ["a red apple"])
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            fail(where, key, prompt, "a text for each image", ["a red apple"])
    return tuple(prompt.strip() for prompt in prompts)


def _negative_prompt(where: str, key: str, value: Any) -> str | tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        fail(where, key, value, "a text, or one for each prompt", "blurry")
    return value if isinstance(value, str) else tuple(value)


def _images(where: str, key: str, value: Any) -> tuple[Any, ...]:
    images = value if isinstance(value, (list, tuple)) else [value]
    for image in images:
        if not isinstance(image, (str, Path, Image.Image)):
            fail(where, key, image, "files or PIL images", ["image.png"])
    return tuple(images)


def _extra(where: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        fail(where, key, value, "a dict of arguments of the model's call", dict(strength=0.5))
    return dict(value)


_CHECKS: dict[str, Callable[[str, str, Any], Any]] = {
    "prompts": _prompts,
    "negative_prompt": _negative_prompt,
    "steps": _integer(1),
    "guidance": _guidance,
    "size": _size,
    "frames": _integer(1),
    "seed": _seed,
    "batch_size": _integer(1),
    **dict.fromkeys(INPUTS, _images),
    "extra": _extra,
}
