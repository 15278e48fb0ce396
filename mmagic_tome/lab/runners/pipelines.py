# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs the pipelines of diffusers, from a folder or hub id, or one that is there already."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...apply import apply_cache, apply_tome
from ...errors import ToMeError, one_line
from ...mmagic.config_keys import read_keys
from ...models import find_adapter, find_denoisers
from ...models.find import DENOISERS
from ...settings import Setting
from ...timeline import scheduler_name
from ..devices import DTYPES
from ..measure import StepMarks, timed
from ..request import Request
from .base import Output, Runner, Source, first_arguments, joined
from .calls import DECODERS, PipelineCall

# Frames per second that models were trained at, by the beginning of their pipelines' names.
_FPS = {"Wan": 16, "SkyReels": 24, "HunyuanVideo": 15}


class PipelineSource(Source):
    """A pipeline in diffusers' layout. Reads ``model_index.json`` and config files, no weights.

    Args:
        path: A folder, or an id on the hub.
        type: Name of the pipeline's class. Default: None, what ``model_index.json`` says.
        config: mmengine's ``Config`` that names it and states the setting, ``infer_cfg`` and
            ``evaluation``. Default: None, nothing of these.
        options: Further arguments of ``from_pretrained``, such as ``torch_dtype='bfloat16'`` or
            ``variant='fp16'``. Default: None. A folder that has weights of one variant only is
            loaded from that one.

    Raises:
        ToMeError: There is no such pipeline; diffusers has no such class.
    """

    def __init__(
        self,
        path: str | Path,
        type: str | None = None,
        config: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = str(path)
        folder = Path(path).expanduser()
        self.folder = str(folder) if folder.is_dir() else self.path
        config = config or {}
        written = config and config.filename
        found = read_keys(config)
        self.setting = Setting(found.get("tome_cfg"), found.get("cache_cfg"))
        self.name = Path(written).stem if written else Path(self.folder).name
        self.defaults = dict(config.get("infer_cfg") or {})
        self.evaluation = dict(config.get("evaluation") or {})
        self.options = dict(options or {})
        name = self.options.get("torch_dtype")
        if isinstance(name, str):
            dtype = DTYPES.get(name, getattr(torch, name, None))
            if not isinstance(dtype, torch.dtype):
                raise ToMeError(f"torch_dtype={name!r} is no dtype; write 'float16' or 'bfloat16'")
            self.options["torch_dtype"] = dtype
        index = _read_json(_find_file(self.folder, "model_index.json"))
        self.class_name = type or index.get("_class_name")
        # Component -> its class; those of the pipeline that are not used are [None, None].
        self.parts = {
            part: value[1]
            for part, value in index.items()
            if isinstance(value, list) and len(value) == 2 and value[1]
        }
        self._unused = [part for part, value in index.items() if value == [None, None]]

    @functools.cached_property
    def pipeline_class(self) -> Any:
        """The pipeline's class. Importing it takes long, so it waits for other checks."""
        return _pipeline_class(self.class_name)

    @functools.cached_property
    def call(self) -> PipelineCall:
        """What the class takes."""
        return PipelineCall(self.pipeline_class, self._configs())

    @property
    def video(self) -> bool:
        return self.call.video

    def _configs(self) -> dict[str, Mapping[str, Any]]:
        configs = {}
        for part in (*DENOISERS, *DECODERS):
            if part in self.parts:
                with contextlib.suppress(ToMeError):  # not downloaded yet: loading will tell
                    configs[part] = _read_json(_find_file(self.folder, f"{part}/config.json"))
        return configs

    def check(self, request: Request) -> None:
        self._check_network()
        self.call.check(request)

    def _check_network(self) -> None:
        """Raise ToMeError unless an adapter knows a network of the pipeline: built without
        memory."""
        import diffusers

        error = ToMeError(
            f"{self.class_name} has no denoising network to merge or to skip; its components are "
            f"{', '.join(self.parts)}"
        )
        for part in [name for name in DENOISERS if name in self.parts]:
            try:
                cls = getattr(diffusers, self.parts[part])
                with torch.device("meta"):
                    find_adapter(cls.from_config(self.call.configs[part]))
                return
            except ToMeError as unknown:
                error = unknown
            except Exception:  # what the meta device cannot build, or no config: loading tells
                return
        raise error

    def load(
        self, request: Request, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> PipelineRunner:
        self.check(request)
        # diffusers wants to be told of some that they are not there, such as SD3's third encoder.
        taken = inspect.signature(self.pipeline_class).parameters
        options = dict.fromkeys(part for part in self._unused if part in taken)
        options = {**options, "variant": self._variant(), **self.options}
        if dtype is not None:
            options["torch_dtype"] = dtype
        try:
            with warnings.catch_warnings():
                # Newer versions of diffusers want another name for it, which older ones ignore.
                warnings.simplefilter("ignore", FutureWarning)
                pipeline = self.pipeline_class.from_pretrained(self.folder, **options)
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise ToMeError(f"cannot load {self.folder}: {one_line(error)}") from error
        if "torch_dtype" not in options:
            # diffusers loads weights of half precision as float32, and transformers as they are.
            pipeline.to(find_denoisers(pipeline, warn=False)[0].network.dtype)
        pipeline.to(device)
        if self.setting.tome is not None:
            apply_tome(pipeline, self.setting.tome)
        if self.setting.cache is not None:
            apply_cache(pipeline, self.setting.cache)
        return PipelineRunner(pipeline, request, self)

    def _variant(self) -> str | None:
        """The variant of weights that are there in no other; None if there are plain ones."""
        folder = _find_file(self.folder, "model_index.json").parent
        for part in self.parts:
            files = [*folder.glob(f"{part}/*.safetensors"), *folder.glob(f"{part}/*.bin")]
            found = [re.match(r"[^.]+\.([^.-]+)(-\d+-of-\d+)?\.", file.name) for file in files]
            if found and all(found):
                variants = sorted({match[1] for match in found})
                return "fp16" if "fp16" in variants else variants[0]
        return None


class PipelineRunner(Runner):
    """Runs a diffusers pipeline; ToMeError if it cannot serve the request, or no adapter knows its
    network.

    ``size`` is what is asked for until a run tells the size of the images: upscalers enlarge
    theirs, and some classes generate at sizes of their own.
    """

    def __init__(
        self, pipeline: Any, request: Request, source: PipelineSource | None = None
    ) -> None:
        self.source = source
        self.model = pipeline
        self.request = request
        parts = {name: getattr(pipeline, name, None) for name in (*DENOISERS, *DECODERS)}
        self.call = PipelineCall(
            type(pipeline),
            {name: part.config for name, part in parts.items() if hasattr(part, "config")},
        )
        self.call.check(request)
        # Wan 2.2 has one network for the first steps and one for the others.
        self.networks = [one.network for one in find_denoisers(pipeline, warn=False)]
        self.network = self.networks[0]
        # Where an offloaded pipeline computes, which is not where it is.
        self.device = torch.device(getattr(pipeline, "_execution_device", pipeline.device))
        self.dtype = next(self.network.parameters()).dtype
        self.steps = self.call.steps if request.steps is None else request.steps
        self.guidance = self.call.guidance if request.guidance is None else request.guidance
        self.size = self._size = self.call.size(pipeline, request)
        self.video = self.call.video
        self.fps = self._fps()
        self.scheduler = scheduler_name(getattr(pipeline, "scheduler", None))

    def _fps(self) -> int:
        for name in ("frame_rate", "fps"):
            found = self.request.extra.get(name, self.call.default(name))
            if found:
                return round(found)
        return next((fps for name, fps in _FPS.items() if self.call.name.startswith(name)), 8)

    def run(
        self,
        numbers: Sequence[int],
        steps: int | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Output:
        arguments = self.call.arguments(self.request, numbers, steps or self.steps, self._size)
        # Some pipelines call the network twice per step, with and without the text; those tell
        # when a step ends, and of others every call is a step.
        told = "callback_on_step_end" in self.call.parameters
        marks = StepMarks(self.networks, self.device, on_step, calls=None if told else 1)
        if told:
            arguments["callback_on_step_end"] = marks.end_step
        try:
            with _quiet(self.model), _decoded_latents(self.model) as decoded, marks:
                seconds, result = timed(lambda: self.model(**arguments), self.device)
        except ValueError as error:  # how pipelines refuse arguments
            if isinstance(error, ToMeError):
                raise
            raise ToMeError(f"{self.call.name}: {one_line(error)}") from error
        images = list(result.frames if hasattr(result, "frames") else result.images)
        first = images[0][0] if self.video else images[0]
        self.size = first.height, first.width
        return Output(
            images=images,
            latents=joined(decoded, len(numbers)),
            seconds=seconds,
            network_seconds=sum(marks.seconds()),
        )


# --- watching a run -------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def _decoded_latents(pipeline: Any) -> contextlib.AbstractContextManager[list[Tensor]]:
    """Yields the latents of every call of ``vae.decode``, as they come."""
    parts = (getattr(pipeline, name, None) for name in DECODERS)
    vae = next((part for part in parts if hasattr(part, "decode")), None)
    return contextlib.nullcontext([]) if vae is None else first_arguments(vae, "decode")


# --- files ----------------------------------------------------------------------------------------


def _find_file(path: str, name: str) -> Path:
    """A file of a folder in diffusers' layout, or of an id on the hub."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ToMeError(f"{path} is no pipeline in diffusers' layout: it has no {name}")
        return folder / name
    if path.startswith(("/", "./", "../", "~")):  # no id starts like this
        raise ToMeError(f"pipeline {path} is not there")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, name))
    except Exception as error:  # of the hub, of the network, for a name that cannot be an id
        raise ToMeError(
            f"pipeline {path!r} is neither a folder nor can the hub provide its {name}: "
            f"{one_line(error)}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ToMeError(f"cannot read {path}: {error}") from None


def _pipeline_class(name: Any) -> Any:
    import diffusers

    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ToMeError(f"diffusers {diffusers.__version__} has no pipeline {name!r}")
    return cls
