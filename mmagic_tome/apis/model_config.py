# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic configs for the ``infer`` command: read, looked into, checked, built.

What can be found wrong without loading a model is found here first.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path

import torch

from .. import ToMeError
from ..mmagic.config_keys import read, translate_tomesd
from ..settings import Setting
from .assets import PACKAGE_ROOT

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_IN_CHECKOUT = (PACKAGE_ROOT.parent / "requirements" / "mminstall.txt").is_file()
# A wheel knows the lines of that file as its extra `mim`.
_LIBRARIES = "-r requirements/mminstall.txt" if _IN_CHECKOUT else "'mmagic_tome[mim]'"
# MMagic without its dependencies: it asks for some that have no wheels and no use here.
NEEDED = f"pip install {_LIBRARIES} && pip install --no-deps mmagic==1.2.0"

# Arguments of `infer` that say that a model wants more than text.
CONDITIONS = (
    "control",
    "image",
    "image_reference",
    "latent_image",
    "reference_subject_images",
    "video_length",
)


def load_config(path, options=()):
    """Read a MMagic config and override entries of it.

    Args:
        path: File of the config.
        options: Overrides as ``'key.of.entry=value'``, parsed as mmengine's
            ``DictAction`` does.

    Returns:
        mmengine's ``Config``; its ``custom_imports`` are done.

    Raises:
        ToMeError: If it cannot be read, in one line that says why.
    """
    try:
        from mmengine.config import Config, DictAction
    except ImportError as error:
        raise ToMeError(f"reading MMagic configs needs mmengine: {NEEDED} ({error})") from error
    try:
        config = Config.fromfile(str(path))
        if options:
            import argparse

            parser = argparse.ArgumentParser()
            parser.add_argument("--options", nargs="+", action=DictAction)
            config.merge_from_dict(parser.parse_args(["--options", *options]).options)
    except ToMeError:
        raise
    except Exception as error:  # whatever Python code in a config can raise
        raise ToMeError(f"cannot read config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config.get("model"), dict) or "type" not in config.model:
        raise ToMeError(f"config {path} has no model=dict(type=...)")
    return config


def inner_model(config):
    """Return the ``model`` entry without ``type='ToMe'`` wrappers around it."""
    model = config.model
    while model.get("type") == "ToMe" and isinstance(model.get("model"), dict):
        model = model["model"]
    return model


def merging_config(config):
    """Return the :class:`ToMeConfig` that a config asks for in any spelling, or None.

    Raises:
        ToMeError: For invalid options, or spellings that contradict each other.
    """
    return setting_config(config).tome


def setting_config(config):
    """Return the :class:`Setting` that a config asks for: merging, caching, both or neither.

    Raises:
        ToMeError: For invalid options, or spellings that contradict each other.
    """
    found = {key: {key: config.get(key)} for key in ("tome_cfg", "cache_cfg")}
    model = config.model
    while isinstance(model, dict):
        kind = model.get("type")
        for key, places in found.items():
            places[f"{key} of {kind}"] = model.get(key)
        found["tome_cfg"][f"tomesd_cfg of {kind}"] = translate_tomesd(model.get("tomesd_cfg"))
        model = model.get("model")
    tome, cache = (read(key, **places) for key, places in found.items())
    return Setting(tome, cache)


def component(model, name):
    """Return the description of a part of a model that a config names.

    It is the part's entry itself, or, where the entry names a local folder in
    diffusers layout, the ``config.json`` there. Nothing is loaded.

    Returns:
        A dict, empty if only loading the part would tell.
    """
    part = model.get(name)
    if not isinstance(part, dict):
        return {}
    source = part.get("from_pretrained") or part.get("from_config")
    if source is None:
        return part
    try:
        path = Path(source, part.get("subfolder") or "", "config.json")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a name on a model hub, or not there: loading will tell


def size_unit(vae_levels, unet_levels):
    """Return what height and width in pixels must be multiples of.

    Args:
        vae_levels, unet_levels: Resolutions that each part works at; all but
            the first halve it. MMagic itself wants multiples of 8.
    """
    return math.lcm(8, 2 ** (max(vae_levels, 1) - 1) * 2 ** (max(unet_levels, 1) - 1))


def check_size(size, unit):
    """Raise :class:`ToMeError` unless both sides of a size fit the model."""
    if size is None or all(side % unit == 0 for side in size):
        return
    near = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
    raise ToMeError(
        f"size {size[0]}x{size[1]} does not fit this model: height and width must be multiples "
        f"of {unit} (for its VAE and the levels of its UNet); the nearest is {near}"
    )


def check_config(config, request, options, compare):
    """Check a request against a config before any model is built.

    Args:
        config: mmengine's ``Config``.
        request: The :class:`Request`.
        options: Options of a :class:`Setting` that replace the config's, a dict or None.
        compare: Whether a merged run is to be compared with a dense one.

    Raises:
        ToMeError: At the first thing that does not fit.
    """
    setting = setting_config(config).replace(**(options or {}))
    if setting.baseline and compare:
        raise ToMeError(
            "nothing to compare: the config has neither tome_cfg nor cache_cfg; add "
            "cache_cfg='balanced' to it, or pass --cache balanced or --ratio 0.5"
        )

    model = inner_model(config)
    vae, unet = component(model, "vae"), component(model, "unet")
    vae_levels = len(vae.get("block_out_channels") or ())
    unet_levels = len(unet.get("down_block_types") or unet.get("block_out_channels") or ())
    # Where only loading tells the levels, at least MMagic's multiples of 8 are certain.
    check_size(request.size, size_unit(vae_levels, unet_levels))
    for name in ("unet", "vae"):
        part = model.get(name)
        source = part.get("from_pretrained") if isinstance(part, dict) else None
        # What looks like a path is one: no hub has names that start like this.
        if source and str(source).startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
            raise ToMeError(f"the config's {name} weights are not there: {source}")


def check_device(name):
    """Return the ``torch.device`` of a name, cuda or cpu if it is None.

    Raises:
        ToMeError: If there is no such device in this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ToMeError(f"device {name!r} is not a device; write cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ToMeError(f"device {name} is not there: this torch finds no GPU; use cpu")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ToMeError(f"device {name} is not there: this machine has cuda:0 to {count - 1}")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ToMeError("device mps is not there; use cpu")
    elif device.type != "cpu":
        raise ToMeError(f"device {name!r} is not supported; write cpu, cuda or cuda:N")
    return device


def build_model(config, device="cpu", dtype=None):
    """Build the model of a config through ``mmagic.apis.init_model``.

    Args:
        config: mmengine's ``Config``.
        device: Where to put the model.
        dtype: ``'fp32'``, ``'fp16'`` or ``'bf16'`` for the whole model; None
            for what the config says.

    Returns:
        The model, in evaluation mode, with its ``tome_cfg`` and ``cache_cfg`` applied.

    Raises:
        ToMeError: If MMagic is missing, weights are not there, the config has
            options that the model does not take, or the model makes images
            from something else than text.
    """
    try:
        from mmagic.apis import init_model
    except ImportError as error:
        raise ToMeError(f"this needs MMagic: {NEEDED} ({error})") from error
    from mmagic.registry import MODELS

    kind = inner_model(config).type
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise ToMeError(f"MMagic has no model {kind!r}")
    check_text_to_image(cls)
    check_arguments(cls, inner_model(config))
    try:
        model = init_model(config, device=str(device))
    except ToMeError:
        raise
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        # What parts of a model raise for an option or a type that they do not know.
        raise ToMeError(
            f"cannot build {cls.__name__} from the config: {type(error).__name__}: {error}"
        ) from error
    except OSError as error:  # what huggingface libraries raise for missing weights
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
        hint = "HF_HUB_OFFLINE is set, nothing is downloaded; " if offline else ""
        raise ToMeError(
            f"cannot load weights: {str(error).rstrip('. ')} "
            f"({hint}a local folder in diffusers layout works in place of a name)"
        ) from error
    if dtype is not None:
        # MMagic's eval() casts the UNet to `model.dtype`.
        model.dtype = DTYPES[dtype]
        model.to(DTYPES[dtype])
        model.eval()
    return model


def check_arguments(cls, model):
    """Raise :class:`ToMeError` for keys of a ``model`` entry that ``cls`` does not take.

    Only those of the model itself: what its parts take shows when they are built.
    """
    known = {"type", "_scope_", "tome_cfg", "cache_cfg"}
    for base in cls.__mro__ if inspect.isclass(cls) else ():
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        known.update(parameter.name for parameter in parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break  # nothing goes on to the bases
    else:
        return  # it takes anything
    unknown = sorted(set(model) - known)
    if unknown:
        names = ", ".join(f"model.{name}" for name in unknown)
        taken = ", ".join(sorted(known - {"self", "args", "kwargs", "type", "_scope_"}))
        raise ToMeError(f"{cls.__name__} does not take {names}; it takes {taken}")


def check_text_to_image(cls):
    """Raise :class:`ToMeError` unless ``cls.infer`` makes images from text alone."""
    infer = getattr(cls, "infer", None)
    names = set(inspect.signature(infer).parameters) if callable(infer) else set()
    extra = sorted(names.intersection(CONDITIONS))
    if "prompt" not in names or extra:
        what = f"it also takes {', '.join(extra)}" if extra else "it has no infer(prompt=...)"
        raise ToMeError(f"{cls.__name__} is not a text-to-image model ({what})")
