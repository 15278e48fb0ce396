# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's Stable Diffusion classes: how each is called, and the configs that build them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import ToMeError
from ...mmagic.config_keys import read, translate_tomesd
from ...settings import Setting
from ..request import Request
from .base import Source, check_inputs, check_size, flat

if TYPE_CHECKING:
    from .mmagic import MMagicRunner

_NEEDED = "pip install 'mmagic_tome[mmagic]' && pip install --no-deps mmagic==1.2.0"


# --- classes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How the ``infer`` of a class is called."""

    #: Field of Request -> argument of `infer`. Inputs that are not here are not taken.
    inputs: Mapping[str, str] = field(default_factory=dict)
    #: Those of `inputs` that may be missing.
    optional: tuple[str, ...] = ()
    #: Field of Request -> (key of the model's config, value): the field has an effect only with
    #: this value, which is not the default.
    only_with: Mapping[str, tuple[str, object]] = field(default_factory=dict)
    #: Arguments that hold one value instead of a list, so that a call makes one image.
    alone: tuple[str, ...] = ()
    guided: bool = False  #: guidance must be above 1: otherwise MMagic takes no step, or fails
    square: bool = False  #: height and width must be equal: MMagic mixes them up
    video: bool = False  #: it returns clips (B, 3, frames, H, W) from 0 to 1, not PIL images
    network_calls: int = 1  #: per step
    scheduler: str = "test_scheduler"  #: the model's attribute with the scheduler of its steps


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

# Arguments of `infer` that a runner decides.
_OWN = "self prompt negative_prompt height width num_inference_steps guidance_scale video_length "
_OWN += "num_images_per_prompt num_videos_per_prompt generator latents seed show_progress "
_OWN += "return_type output_type return_dict"


def call_of(cls: type) -> Call:
    """How a class is called; ToMeError if it is not of MMagic's Stable Diffusion family."""
    for base in getattr(cls, "__mro__", ()):
        if base.__name__ in CLASSES:
            return CLASSES[base.__name__]
    raise ToMeError(
        f"{getattr(cls, '__name__', cls)} is none of MMagic's Stable Diffusion classes: "
        f"{', '.join(CLASSES)}"
    )


def check_request(cls: type, request: Request) -> None:
    """Raise ToMeError for the first thing of a request that a class cannot serve."""
    name, call = cls.__name__, call_of(cls)
    check_inputs(name, request, call.inputs, {*call.inputs} - {*call.optional})
    if request.frames is not None and not call.video:
        raise ToMeError(f"{name} makes images, not clips; leave frames (--frames) out")
    parameters = inspect.signature(cls.infer).parameters
    for extra in request.extra:
        taken = sorted({*parameters} - {*_OWN.split()} - {*call.inputs.values()})
        if extra not in taken:
            raise ToMeError(f"{name} takes no {extra!r}; it takes {', '.join(taken)}")
    if call.guided and request.guidance is not None and request.guidance <= 1:
        raise ToMeError(f"{name} needs guidance above 1, got {request.guidance:g}")
    check_size(name, request.size, 8)
    if call.square and request.size is not None and len({*request.size}) > 1:
        raise ToMeError(f"{name} makes square images only, got size {request.size}")
    for number, prompt in enumerate(request.prompts if name == "FastComposer" else ()):
        subjects = len(flat(request.inputs("references", [number])))
        if prompt.count("img") != subjects:
            raise ToMeError(
                "FastComposer needs a reference for each 'img' of a prompt, as in 'a man img': "
                f"{prompt!r} has {prompt.count('img')}, and {subjects} references"
            )


# --- configs --------------------------------------------------------------------------------------


def load_config(name: str | Path) -> Any:
    """mmengine's ``Config`` of a file, with its ``custom_imports`` done.

    ``package::path`` is looked up in ``.mim/configs`` of the package (an OpenMMLab wheel) and in
    ``configs`` beside it (a checkout); nothing of the package is imported. ToMeError: there is no
    such file; it is no config; it cannot be read.
    """
    path = _resolve(name)
    if not path.exists():
        raise ToMeError(f"config {name} does not exist")
    try:
        from mmengine.config import Config

        return Config.fromfile(str(path))
    except ModuleNotFoundError as error:
        raise ToMeError(f"config {name} needs what is missing: {_NEEDED} ({error})") from error
    except Exception as error:  # whatever the code in a config can raise
        raise ToMeError(f"cannot read config {name}: {type(error).__name__}: {error}") from error


def _resolve(name: str | Path) -> Path:
    package, separator, relative = str(name).partition("::")
    if not separator:
        return Path(name).expanduser()
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.origin:
        raise ToMeError(f"config {name}: no package {package!r} is installed")
    root = Path(spec.origin).parent
    found = [root / ".mim" / "configs" / relative, root.parent / "configs" / relative]
    return next((path for path in found if path.is_file()), found[0])


def setting_of(config: Any) -> Setting:
    """What a config applies to its model: of ``tome_cfg`` and ``cache_cfg``, wherever they are;
    ToMeError if these are invalid or contradict each other."""
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
    """Raise ToMeError if an entry of a config names local files or folders that are not there."""
    for name, value in entry.items() if isinstance(entry, Mapping) else ():
        _check_paths(value, f"{key}.{name}")
    # No name on a hub starts like this.
    local = isinstance(entry, str) and entry.startswith(("/", "./", "../", "~"))
    if local and not Path(entry).expanduser().exists():
        raise ToMeError(f"{key} of the config is not there: {entry}")


class MMagicSource(Source):
    """mmengine's ``Config`` of a class of MMagic's Stable Diffusion family, and a checkpoint: a
    file (or URL) with weights of the model or of a part of it, by default the config's
    ``load_from``, if anything.

    Raises:
        ToMeError: The config has no model, or invalid options; the checkpoint is not there. When
            it is first used: MMagic is not installed; the model is of another class.
    """

    def __init__(self, config: Any, checkpoint: str | Path | None = None) -> None:
        self.config, self.path = config, str(config.filename or "")
        self.checkpoint = os.path.expanduser(checkpoint or config.get("load_from") or "")
        # mmengine downloads what is an address.
        local = self.checkpoint and "://" not in self.checkpoint
        if local and not Path(self.checkpoint).is_file():
            raise ToMeError(f"checkpoint {self.checkpoint} is not there")
        self.setting = setting_of(config)
        self.model = config.get("model")
        while isinstance(self.model, dict) and self.model.get("type") == "ToMe":
            self.model = self.model.get("model")
        if not isinstance(self.model, dict) or "type" not in self.model:
            raise ToMeError(f"config {self.path} has no model=dict(type=...)")
        kind = self.model["type"]
        self.class_name = kind if isinstance(kind, str) else kind.__name__
        self.name = Path(config.filename or self.class_name).stem
        self.defaults = dict(config.get("infer_cfg") or {})
        self.evaluation = dict(config.get("evaluation") or {})

    @functools.cached_property
    def cls(self) -> type:
        """The model's class. Importing MMagic takes long, so it waits for other checks."""
        return _class_of(self.model["type"])

    @property
    def call(self) -> Call:
        """How the class is called."""
        return call_of(self.cls)

    @property
    def video(self) -> bool:
        return self.call.video

    def check(self, request: Request) -> None:
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
        self, request: Request, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> MMagicRunner:
        from mmagic.apis import init_model

        from .mmagic import MMagicRunner

        self.check(request)
        unet = self.model.get("unet") or {}
        if not self.checkpoint and unet.get("from_pretrained") is None:
            known = "the config names none, and there is no checkpoint"
            warnings.warn(f"the UNet of {self.name} has random weights: {known}", stacklevel=2)
        try:
            # A copy, as MMagic takes entries out of it.
            model = init_model(copy.deepcopy(self.config), device="cpu")
        except (TypeError, KeyError, ValueError, AssertionError, OSError) as error:
            # Options and types that a part does not know; weights that no hub has.
            if isinstance(error, ToMeError):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise ToMeError(f"cannot build {self.class_name} from the config: {reason}") from error
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
        reason = f"{type(error).__name__}: {error}"
        raise ToMeError(f"cannot load checkpoint {name}: {reason}") from error
    if len(others) == len(weights):
        raise ToMeError(f"checkpoint {name} has no weight of {type(model).__name__}: {others[:1]}")
