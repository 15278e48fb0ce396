# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Patches of libraries that MMagic imports."""

import contextlib
import glob
import importlib
import importlib.util
import inspect
import os
import pickle
import types

from .base import Absent, is_installed, patch_of, replace_method, substituted


@patch_of("torchvision")
def torchvision_operators():
    """torchvision built for another torch: "operator torchvision::nms does not exist".

    As for CUDA, beside a CPU torch. torchvision goes on without its compiled operators, but then
    attaches shape functions to two of them. Declaring the two without an implementation is enough.
    """
    import torch

    if os.name == "nt":  # where torchvision sets up folders of DLLs before it can load
        return
    (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
    for library in glob.glob(os.path.join(folder, "_C*.so")):
        # What torchvision is about to do: a second declaration of loaded operators would clash.
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_operators.library = library  # lives as long as its declarations
    yield


@patch_of("mmagic.utils.trans_utils")
def numpy_bool8():
    """numpy 2: "module 'numpy' has no attribute 'bool8'"."""
    import numpy as np

    if "bool8" in vars(np) or np.lib.NumpyVersion(np.__version__) < "2.0.0":
        return
    np.bool8 = np.bool_
    try:
        yield
    finally:
        del np.bool8


def _stand_in(name, make):
    """``sys.modules[name]`` is ``make()`` during an import, unless there is such a module."""
    if not is_installed(name):
        with substituted(name, make()):
            yield


@patch_of("mmcv.ops")
def mmcv_compiled_operators():
    """mmcv-lite: "No module named 'mmcv._ext'".

    The Stable Diffusion family uses none of mmcv's compiled operators, but MMagic imports
    ``mmcv.ops`` for its other models. Left in place afterwards, the stand-in would make mmengine
    believe that the full mmcv is there.
    """
    remedy = (
        "it is compiled code of the full mmcv, and mmcv-lite is installed: "
        "pip uninstall mmcv-lite && pip install 'mmcv>=2.0.0,<2.2.0'"
    )
    yield from _stand_in("mmcv._ext", lambda: Absent("mmcv._ext", remedy))


@patch_of("mmagic.models.editors.vico.vico_utils")
def diffusers_unet_module():
    """diffusers >= 0.29: "No module named 'diffusers.models.unet_2d_condition'"."""
    yield from _stand_in(
        "diffusers.models.unet_2d_condition",
        lambda: importlib.import_module("diffusers.models.unets.unet_2d_condition"),
    )


@patch_of("mmagic.models.editors.animatediff.animatediff_utils")
def diffusers_paint_by_example():
    """diffusers >= 0.38: "No module named 'diffusers.pipelines.paint_by_example'".

    MMagic's converter of original checkpoints names one class of it, for a kind of
    checkpoint that no MMagic model has.
    """
    gone = types.ModuleType("diffusers.pipelines.paint_by_example")
    gone.PaintByExampleImageEncoder = type("PaintByExampleImageEncoder", (), {})
    yield from _stand_in(gone.__name__, lambda: gone)


@patch_of("mmagic.models", lasting=True)
def transformers_text_model():
    """transformers >= 5: "'CLIPTextModel' object has no attribute 'text_model'".

    What used to be in ``CLIPTextModel().text_model`` is in the model itself now, so
    that is what the property returns. ``state_dict`` keys do not change.
    """
    from transformers import CLIPTextModel

    if "self.text_model =" not in inspect.getsource(CLIPTextModel):
        CLIPTextModel.text_model = property(lambda self: self)
        yield


@patch_of("mmagic.models.editors.stable_diffusion.clip_wrapper", lasting=True)
def transformers_feature_extractor():
    """transformers >= 5: "No module named 'transformers.models.clip.feature_extraction_clip'".

    The class that MMagic wants from there is ``CLIPImageProcessor`` now. And a model has to call
    ``post_init`` at the end of its ``__init__``, or ``from_pretrained`` fails, so MMagic's safety
    checker does it as well.
    """
    name = "transformers.models.clip.feature_extraction_clip"
    if is_installed(name):
        return
    renamed = types.ModuleType(name)
    renamed.CLIPFeatureExtractor = importlib.import_module("transformers").CLIPImageProcessor
    with substituted(name, renamed):
        yield
    from mmagic.models.editors.stable_diffusion.clip_wrapper import StableDiffusionSafetyChecker

    @replace_method(StableDiffusionSafetyChecker, "__init__")
    def __init__(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.post_init()


@patch_of("mmagic.apis.inferencers.controlnet_animation_inferencer")
def controlnet_aux_missing():
    """controlnet_aux missing or broken: "No module named 'controlnet_aux'".

    One of MMagic's inferencers needs it, and all of them are imported together.
    """
    yield from _absent_if_broken("controlnet_aux")


@patch_of("mmagic.datasets.transforms.albu_function")
def albumentations_missing():
    """albumentations missing or broken: "No module named 'albumentations'".

    Some augmentations for training need it, and ``pip install mmagic`` does not bring it; every
    inferencer imports MMagic's metrics, and they import the augmentations.
    """
    yield from _absent_if_broken("albumentations")


def _absent_if_broken(name):
    """Replace a module during an import; the stand-in says what is missing where it is used."""
    try:
        importlib.import_module(name)
        return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    absent = Absent(name, f"it cannot be imported ({reason}): pip install {name}")
    with substituted(name, absent):
        yield


@patch_of("mmengine.runner.checkpoint", lasting=True)
def mmengine_resume():
    """torch >= 2.6: "Weights only load failed" when a Runner resumes from its own checkpoint.

    Beside weights there are logs in it, mmengine's ``HistoryBuffer``: numbers of numpy and the
    names of its own methods. These are declared harmless; torch refuses everything else as before.
    """
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    if torch.__version__ < (2, 6):
        return

    def method_of_logs(owner, name):
        """What ``getattr`` becomes inside a checkpoint: nothing but methods of the logs."""
        if owner is not HistoryBuffer or name not in vars(HistoryBuffer):
            raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) in a checkpoint")
        return getattr(owner, name)

    named = [(method_of_logs, f"{builtins}.getattr") for builtins in ("__builtin__", "builtins")]
    torch.serialization.add_safe_globals([HistoryBuffer, *named, *_numbers_of_numpy()])
    yield


def _numbers_of_numpy():
    """What numpy's arrays and scalars of numbers are pickled with, for ``add_safe_globals``."""
    import numpy as np

    functions = [np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    # numpy 2 has moved them; a checkpoint may have been written by either.
    named = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in functions
        for core in ("core", "_core")
    ]
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
