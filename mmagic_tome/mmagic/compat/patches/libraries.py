# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Patches of libraries that MMagic imports."""

import contextlib
import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import io
import os
import pickle
import sys
import types
import warnings

from .base import Absent, is_installed, patch_of, substituted


@patch_of("torchvision")
def torchvision_operators():
    """torchvision built for another torch: "operator torchvision::nms does not exist".

    A CPU torch beside a torchvision wheel for CUDA is the usual case. torchvision
    cannot load its compiled operators and goes on without them, but then attaches
    shape functions to two of them, and with it even ``from transformers import
    CLIPTextModel`` dies. Declaring the two without an implementation is enough.
    """
    import torch

    if os.name == "nt":
        # There torchvision sets up folders of DLLs first, so that a failure to load
        # here would not tell that it is going to fail, and declaring twice breaks it.
        return
    (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
    libraries = glob.glob(os.path.join(folder, "_C*.so"))
    for library in libraries:
        # Loading is what torchvision is about to do, so it costs nothing twice. It
        # is the only sure test: a second declaration of loaded operators would clash.
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

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 1.24 to 1.26 have it, with a warning
        if hasattr(np, "bool8"):
            return
    np.bool8 = np.bool_
    try:
        yield
    finally:
        del np.bool8


@patch_of("mmcv.ops")
def mmcv_compiled_operators():
    """mmcv-lite: "No module named 'mmcv._ext'".

    The Stable Diffusion family uses none of mmcv's compiled operators, but MMagic
    imports ``mmcv.ops`` for its other models. A stand-in answers the import with
    functions that say what to install, and is gone afterwards: left in place, it
    would make mmengine believe that the full mmcv is there.
    """
    if is_installed("mmcv._ext"):
        return

    remedy = (
        "it is compiled code of the full mmcv, and mmcv-lite is installed: "
        "pip uninstall mmcv-lite && pip install 'mmcv>=2.0.0,<2.2.0'"
    )
    with substituted("mmcv._ext", Absent("mmcv._ext", remedy)):
        yield


@patch_of("mmagic.models.editors.vico.vico_utils")
def diffusers_unet_module():
    """diffusers >= 0.29: "No module named 'diffusers.models.unet_2d_condition'"."""
    if is_installed("diffusers.models.unet_2d_condition"):
        return
    moved = importlib.import_module("diffusers.models.unets.unet_2d_condition")
    with substituted("diffusers.models.unet_2d_condition", moved):
        yield


@patch_of("mmagic.models.editors.animatediff.animatediff_utils")
def diffusers_paint_by_example():
    """diffusers >= 0.38: "No module named 'diffusers.pipelines.paint_by_example'".

    MMagic's converter of original checkpoints names one class of it, for a kind of
    checkpoint that no MMagic model has.
    """
    if is_installed("diffusers.pipelines.paint_by_example"):
        return
    gone = types.ModuleType("diffusers.pipelines.paint_by_example")
    gone.PaintByExampleImageEncoder = type("PaintByExampleImageEncoder", (), {})
    with substituted(gone.__name__, gone):
        yield


@patch_of("mmagic.models.archs")
def diffusers_broken_names():
    """one pipeline is broken and none works: "Failed to import diffusers.pipelines...".

    MMagic registers everything that diffusers has, and so fails with the first thing
    that cannot be imported, be it another version of transformers that it needs or a
    name without a file (``controlnet_xs`` in diffusers 0.25 to 0.27). The names that
    fail are None while MMagic looks at them, and as they were afterwards.
    """
    import diffusers

    broken = []
    for package in (diffusers.models, diffusers.pipelines):
        for name in dir(package):
            try:
                getattr(package, name)  # imports it, as MMagic is about to do
            except Exception:
                broken.append((package, name))
    if not broken:
        return
    for package, name in broken:
        setattr(package, name, None)
    try:
        yield
    finally:
        for package, name in broken:
            delattr(package, name)


@patch_of("mmagic.models", lasting=True)
def transformers_text_model():
    """transformers >= 5: "'CLIPTextModel' object has no attribute 'text_model'".

    What used to be in ``CLIPTextModel().text_model`` is in the model itself now, so
    that is what the property returns. ``state_dict`` keys do not change.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    smallest = CLIPTextConfig(
        vocab_size=2,
        hidden_size=2,
        intermediate_size=2,
        projection_dim=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    # The attribute is set in ``__init__``, so only an instance can tell.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if hasattr(CLIPTextModel(smallest), "text_model"):
            return
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
    if is_installed(name) or not is_installed("transformers"):
        return
    renamed = types.ModuleType(name)
    renamed.CLIPFeatureExtractor = importlib.import_module("transformers").CLIPImageProcessor
    with substituted(name, renamed):
        yield
    wrapper = sys.modules["mmagic.models.editors.stable_diffusion.clip_wrapper"]
    checker = wrapper.StableDiffusionSafetyChecker
    init = checker.__init__

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.post_init()

    checker.__init__ = __init__


@patch_of("controlnet_aux")
def mediapipe_solutions():
    """mediapipe >= 1: "module 'mediapipe' has no attribute 'solutions'".

    controlnet_aux knows how to do without mediapipe (its face detector is off then),
    so mediapipe is hidden from it while it is imported. A plain ``pip install
    mmagic`` brings both.
    """
    if not is_installed("mediapipe"):
        return
    try:
        if hasattr(importlib.import_module("mediapipe"), "solutions"):
            return
    except ImportError:
        return  # controlnet_aux expects that
    except Exception:  # a mediapipe that cannot start: no audio library, another numpy, ...
        pass
    with substituted("mediapipe", None):
        yield


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


@patch_of("mmengine.utils.package_utils", lasting=True)
def mmengine_pkg_resources():
    """setuptools >= 81 or none: "No module named 'pkg_resources'".

    mmengine asks it for the folder of a package, when a config has a ``_base_`` like
    ``'mmagic::stable_diffusion/...'``. :mod:`importlib.metadata` knows as well.
    """
    if is_installed("pkg_resources"):
        return
    yield
    package_utils = sys.modules["mmengine.utils.package_utils"]
    ours = {
        "is_installed": _is_package_installed,
        "package2module": _package_to_module,
        "get_installed_path": _get_installed_path,
    }
    theirs = {name: getattr(package_utils, name) for name in ours}
    # mmengine's other modules import these by name; some may have done so already.
    loaded = [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == "mmengine"]
    for name, function in ours.items():
        function = functools.wraps(theirs[name], assigned=("__doc__",), updated=())(function)
        for module in loaded:
            if vars(module).get(name) is theirs[name]:
                setattr(module, name, function)


def _is_package_installed(package):
    try:
        importlib.metadata.distribution(package)
        return True
    except importlib.metadata.PackageNotFoundError:
        return is_installed(package)


def _package_to_module(package):
    top_level = importlib.metadata.distribution(package).read_text("top_level.txt")
    if not top_level:
        raise ValueError(f"can not infer the module name of {package}")
    return top_level.split("\n")[0]


def _get_installed_path(package):
    module = package
    if not is_installed(package):
        module = _package_to_module(package)  # mmcv-full -> mmcv; raises PackageNotFoundError
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is a namespace package, which has no single folder")
    return os.path.dirname(spec.origin)


@patch_of("mmengine.runner.checkpoint", lasting=True)
def mmengine_resume():
    """torch >= 2.6: "Weights only load failed" when a Runner resumes from its own checkpoint.

    Beside weights there are logs in it, mmengine's ``HistoryBuffer`` of numpy numbers, and torch
    loads by default nothing that was not declared harmless. They hold numbers, and the names of
    their own methods for averages, so they are declared so; everything else is refused as before.
    """
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    def method_of_logs(owner, name):
        """What ``getattr`` becomes inside a checkpoint: nothing but methods of the logs."""
        if owner is not HistoryBuffer or name not in vars(HistoryBuffer):
            raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) in a checkpoint")
        return getattr(owner, name)

    file = io.BytesIO()
    torch.save({"log": HistoryBuffer([0.5], [1])}, file)
    file.seek(0)
    try:
        torch.load(file)
        return
    except pickle.UnpicklingError:
        pass
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
