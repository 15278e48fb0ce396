# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's Stable Diffusion classes: how each is called, and the configs that build them."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import ToMeError
from ...mmagic.config_keys import read, translate_tomesd
from ...settings import Setting
from ..request import INPUTS, Request
from .base import Source

if TYPE_CHECKING:
    from .mmagic import MMagicRunner

_NEEDED = "pip install 'mmagic_tome[mim]' && pip install --no-deps mmagic==1.2.0"


# --- classes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How the ``infer`` of a class is called.

    Attributes:
        inputs: Field of :class:`Request` -> argument of ``infer``. Inputs that are not here are not
            taken.
        optional: Those of ``inputs`` that may be missing.
        only_with: Field of :class:`Request` -> (key of the model's config, value): the field has an
            effect only with this value, which is not the default.
        alone: Arguments that hold one value instead of a list, so that a call makes one image.
        guided: Whether guidance must be above 1: at 1 and below, MMagic takes no step, or fails.
        square: Whether height and width must be equal: MMagic mixes them up.
        video: Whether it returns clips, (B, 3, frames, H, W) from 0 to 1, instead of PIL images.
        network_calls: Calls of the network per step.
        scheduler: Attribute of the model with the scheduler of its steps.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    only_with: Mapping[str, tuple[str, object]] = field(default_factory=dict)
    alone: tuple[str, ...] = ()
    guided: bool = False
    square: bool = False
    video: bool = False
    network_calls: int = 1
    scheduler: str = "test_scheduler"


#: Name of a class -> how it is called. A subclass is called as its base. All take ``latents``.
CLASSES = {
    "StableDiffusion": Call(),
    "StableDiffusionXL": Call(
        only_with={"negative_prompt": ("force_zeros_for_empty_prompt", False)}
    ),
    "StableDiffusionInpaint": Call({"images": "image", "masks": "mask_image"}),
    "ControlStableDiffusion": Call({"controls": "control"}, guided=True),
    "ControlStableDiffusionImg2Img": Call(
        {"controls": "control", "images": "latent_image", "references": "reference_img"},
        optional=("references",),
        only_with={"references": ("attention_injection", True)},
        guided=True,
    ),
    "AnimateDiff": Call(guided=True, video=True),
    "DreamBooth": Call(),
    "TextualInversion": Call(),
    "ViCo": Call(
        {"references": "image_reference"},
        alone=("image_reference",),
        guided=True,
        square=True,
        network_calls=2,
    ),
    "FastComposer": Call(
        {"references": "reference_subject_images"},
        alone=("prompt", "negative_prompt"),
        guided=True,
        scheduler="scheduler",
    ),
}

_OPTIONS = {"images": "--img", "masks": "--mask", "controls": "--control"}
_OPTIONS["references"] = "--reference"
# Arguments of `infer` that a runner decides.
_OWN = "self prompt negative_prompt height width num_inference_steps guidance_scale video_length "
_OWN += "num_images_per_prompt num_videos_per_prompt generator latents seed show_progress "
_OWN += "return_type output_type return_dict"


def call_of(cls: type) -> Call:
    """How a class is called.

    Raises:
        ToMeError: It is not of MMagic's Stable Diffusion family.
    """
    for base in getattr(cls, "__mro__", ()):
        if base.__name__ in CLASSES:
            return CLASSES[base.__name__]
    raise ToMeError(
        f"{getattr(cls, '__name__', cls)} is none of MMagic's Stable Diffusion classes: "
        f"{', '.join(CLASSES)}"
    )


def flat(images: Sequence[Any]) -> list[Any]:
    """Inputs in one list: an entry may be a list, such as of FastComposer's subjects."""
    lists = [one if isinstance(one, (list, tuple)) else [one] for one in images]
    return [image for one in lists for image in one]


def check_request(cls: type, request: Request) -> None:
    """Fail unless a class can serve a request.

    Args:
        cls: A class of MMagic's Stable Diffusion family.
        request: What to generate.

    Raises:
        ToMeError: The first thing that does not fit.
    """
    name, call = cls.__name__, call_of(cls)
    for kind in INPUTS:
        _check_input(name, call, request, kind)
    if request.frames is not None and not call.video:
        raise ToMeError(f"{name} makes images, not clips; leave frames (--frames) out")
    parameters = inspect.signature(cls.infer).parameters
    for extra in request.extra:
        taken = sorted({*parameters} - {*_OWN.split()} - {*call.inputs.values()})
        if extra not in taken:
            raise ToMeError(f"{name} takes no {extra!r}; it takes {', '.join(taken)}")
    if call.guided and request.guidance is not None and request.guidance <= 1:
        raise ToMeError(f"{name} needs guidance above 1, got {request.guidance:g}")
    height, width = request.size or (8, 8)
    if height % 8 or width % 8:
        near = f"{max(8, round(height / 8) * 8)}x{max(8, round(width / 8) * 8)}"
        raise ToMeError(
            f"size {height}x{width} does not fit: write multiples of 8; the nearest is {near}"
        )
    if call.square and height != width:
        raise ToMeError(f"{name} makes square images only, got size {height}x{width}")


def _check_input(name: str, call: Call, request: Request, kind: str) -> None:
    given, shown = getattr(request, kind), f"{kind} ({_OPTIONS[kind]})"
    if not given:
        if kind in call.inputs and kind not in call.optional:
            raise ToMeError(f"{name} needs {shown}: one for all prompts, or one for each")
        return
    if kind not in call.inputs:
        takes = " and ".join(call.inputs) or "prompts alone"
        raise ToMeError(f"{name} does not take {shown}; it takes {takes}")
    if len(given) not in (1, len(request)):
        raise ToMeError(
            f"{shown}: got {len(given)} for {len(request)} prompts; give one for all, or one for "
            "each"
        )
    for image in flat(given):
        if isinstance(image, (str, Path)) and not Path(image).expanduser().is_file():
            raise ToMeError(f"{shown}: {image} is not there")
    for number, prompt in enumerate(request.prompts if name == "FastComposer" else ()):
        subjects = len(flat(request.inputs(kind, [number])))
        if prompt.count("img") != subjects:
            raise ToMeError(
                "FastComposer needs a reference for each 'img' of a prompt, as in 'a man img': "
                f"{prompt!r} has {prompt.count('img')}, and {subjects} references"
            )


# --- configs --------------------------------------------------------------------------------------


def resolve_config(name: str | Path) -> Path:
    """The file of a config.

    Args:
        name: A path, or ``package::path``, which is looked up in ``.mim/configs`` of the package
            (an OpenMMLab wheel) and in ``configs`` beside it (a checkout); nothing is imported.

    Raises:
        ToMeError: There is no such file, or it is no config.
    """
    package, separator, relative = str(name).partition("::")
    folders = [Path()]
    if separator:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.origin:
            raise ToMeError(f"config {name}: no package {package!r} is installed")
        root = Path(spec.origin).parent
        folders = [root / ".mim" / "configs", root.parent / "configs"]
    for path in [folder / Path(relative or name).expanduser() for folder in folders]:
        if path.is_file():
            if path.suffix not in (".py", ".json", ".yaml", ".yml"):
                raise ToMeError(f"config {name} is not a .py, .json, .yaml or .yml file")
            return path
        if path.is_dir():
            raise ToMeError(f"config {name} is a folder, not a file")
    raise ToMeError(f"config {name} does not exist")


def load_config(name: str | Path, options: Sequence[str] = ()) -> Any:
    """Read a config and override entries of it.

    Args:
        name: See :func:`resolve_config`.
        options: Overrides, ``'key.of.entry=value'``, read as mmengine's ``DictAction`` does.

    Returns:
        mmengine's ``Config``; its ``custom_imports`` are done.

    Raises:
        ToMeError: It cannot be read.
    """
    path = resolve_config(name)
    for option in options:
        if "=" not in option[1:]:
            raise ToMeError(f"--cfg-options takes KEY=VALUE, got {option!r}")
    try:
        from mmengine.config import Config, DictAction

        config = Config.fromfile(str(path))
        given = argparse.Namespace()
        DictAction([], "options")(None, given, options)
        config.merge_from_dict(given.options)
    except ModuleNotFoundError as error:
        raise ToMeError(f"config {name} needs what is missing: {_NEEDED} ({error})") from error
    except Exception as error:  # whatever the code in a config can raise
        raise ToMeError(f"cannot read config {name}: {type(error).__name__}: {error}") from error
    return config


def setting_of(config: Any) -> Setting:
    """What a config applies to its model: of ``tome_cfg`` and ``cache_cfg``, wherever they are.

    Raises:
        ToMeError: Invalid options, or places that contradict each other.
    """
    found = {key: {key: config.get(key)} for key in ("tome_cfg", "cache_cfg")}
    model = config.get("model")
    while isinstance(model, dict):
        kind = model.get("type")
        for key, places in found.items():
            places[f"{key} of {kind}"] = model.get(key)
        found["tome_cfg"][f"tomesd_cfg of {kind}"] = translate_tomesd(model.get("tomesd_cfg"))
        model = model.get("model")
    return Setting(*(read(key, **places) for key, places in found.items()))


def _check_paths(entry: Any, key: str) -> None:
    """Fail if an entry of a config names local files or folders that are not there."""
    if isinstance(entry, Mapping):
        for name, value in entry.items():
            _check_paths(value, f"{key}.{name}")
    # No name on a hub starts like this.
    local = isinstance(entry, str) and entry.startswith(("/", "./", "../", "~"))
    if local and not Path(entry).expanduser().exists():
        raise ToMeError(f"{key} of the config is not there: {entry}")


class MMagicSource(Source):
    """A config of a class of MMagic's Stable Diffusion family, and a checkpoint.

    Args:
        config: mmengine's ``Config``, or what :func:`load_config` reads.
        checkpoint: File (or URL) with weights of the model or of a part of it, as MMagic's
            training writes them. Default: None, what the config has as ``load_from``, if anything.

    Raises:
        ToMeError: MMagic is not installed; the config has no such model, or invalid options; the
            checkpoint is not there.
    """

    kind = "mmagic"

    def __init__(self, config: Any, checkpoint: str | Path | None = None) -> None:
        written = config if isinstance(config, (str, Path)) else config.filename
        if written is config:
            config = load_config(config)
        self.config, self.path = config, str(written or "")
        self.setting = setting_of(config)
        self.model = config.get("model")
        while isinstance(self.model, dict) and self.model.get("type") == "ToMe":
            self.model = self.model.get("model")
        if not isinstance(self.model, dict) or "type" not in self.model:
            raise ToMeError(f"config {self.path} has no model=dict(type=...)")
        self.cls = _class_of(self.model["type"])
        self.call = call_of(self.cls)
        self.class_name, self.video = self.cls.__name__, self.call.video
        self.name = Path(config.filename or self.class_name).stem
        self.defaults = dict(config.get("infer_cfg") or {})
        self.evaluation = dict(config.get("evaluation") or {})
        self.checkpoint = os.path.expanduser(checkpoint or config.get("load_from") or "")
        local = self.checkpoint and "://" not in self.checkpoint
        if local and not Path(self.checkpoint).is_file():
            raise ToMeError(f"checkpoint {self.checkpoint} is not there")

    def check(self, request: Request) -> None:
        """See :meth:`Source.check`."""
        check_request(self.cls, request)
        for name, (key, value) in self.call.only_with.items():
            if getattr(request, name) and self.model.get(key, not value) != value:
                raise ToMeError(
                    f"{self.class_name} uses {name} only with model.{key}={value} in the config"
                )
        motion = (self.model.get("unet") or {}).get("motion_module_kwargs") or {}
        most = motion.get("temporal_position_encoding_max_len")
        if most and (request.frames or 0) > most:
            raise ToMeError(f"the model makes at most {most} frames, got frames={request.frames}")
        _check_paths(self.model, "model")

    def load(
        self,
        request: Request,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> MMagicRunner:
        """See :meth:`Source.load`; ``dtype`` casts the whole model."""
        from mmagic.apis import init_model

        from .mmagic import MMagicRunner

        self.check(request)
        unet = self.model.get("unet") or {}
        if not self.checkpoint and unet.get("from_pretrained") is None:
            warnings.warn(
                f"the UNet of {self.name} has random weights: the config names none, and there is "
                "no checkpoint",
                stacklevel=2,
            )
        try:
            # A copy, as MMagic takes entries out of it.
            model = init_model(copy.deepcopy(self.config), device="cpu")
        except ToMeError:
            raise
        except (TypeError, KeyError, ValueError, AssertionError, OSError) as error:
            # Options and types that a part does not know; weights that no hub has.
            raise ToMeError(
                f"cannot build {self.class_name} from the config: {type(error).__name__}: {error}"
            ) from error
        if self.checkpoint:
            _load_checkpoint(model, self.checkpoint)
        if dtype is not None:
            model.to(dtype)
            # eval() casts the UNet to the model's, and MMagic's own UNet its input to its own.
            for module in (model, model.unet):
                if "dtype" in vars(module):
                    module.dtype = dtype
        return MMagicRunner(model.to(device).eval(), request, source=self)


def _class_of(kind: Any) -> type:
    try:
        import mmagic.models  # noqa: F401  (registers the classes)
        from mmagic.registry import MODELS
    except ImportError as error:
        raise ToMeError(f"this needs MMagic: {_NEEDED} ({error})") from error
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise ToMeError(f"MMagic has no model {kind!r}")
    return cls


def _load_checkpoint(model: nn.Module, name: str) -> None:
    """Load weights of a model, or of a part of it, such as LoRA's."""
    from mmengine.runner.checkpoint import CheckpointLoader

    try:
        loaded = CheckpointLoader.load_checkpoint(name, map_location="cpu")
        weights = loaded.get("state_dict", loaded)
        # Those of a model that was trained on several devices.
        weights = {key[7:] if key.startswith("module.") else key: weights[key] for key in weights}
        others = model.load_state_dict(weights, strict=False).unexpected_keys
    except Exception as error:  # whatever reading a file that is none can raise
        raise ToMeError(
            f"cannot load checkpoint {name}: {type(error).__name__}: {error}"
        ) from error
    if len(others) == len(weights):
        raise ToMeError(f"checkpoint {name} has no weight of {type(model).__name__}: {others[:1]}")
