# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Each patch alone: it acts on its symptom, leaves no trace that is not needed, and
touches nothing where the symptom is absent (full mmcv, older or matching libraries)."""

import collections
import copy
import importlib
import importlib.machinery
import inspect
import sys
import types

import pytest

from mmagic_tome.mmagic import compat
from mmagic_tome.mmagic.compat.patches import PATCHES, libraries, patch_of
from mmagic_tome.mmagic.compat.patches import mmagic as of_mmagic


def finds_nothing(patch):
    """Whether a patch returns without doing anything."""
    return next(patch(), "nothing") == "nothing"


def fake_package(monkeypatch, name, **attributes):
    """An importable, findable package ``name`` with these attributes."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return module


@pytest.fixture
def without(monkeypatch):
    """Makes modules unfindable."""

    def hide(*names):
        real = importlib.util.find_spec

        def find_spec(name, package=None):
            return None if name in names else real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        for name in list(sys.modules):
            if name in names or name.startswith(tuple(f"{n}." for n in names)):
                monkeypatch.delitem(sys.modules, name)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_every_patch_states_its_symptom():
    assert len(PATCHES) == len({patch.__name__ for patch in PATCHES}) >= 11
    for patch in PATCHES:
        assert 20 < len(patch.symptom) < 120
        assert '"' in patch.symptom, "the error message itself, to be found by a search"


# --- torchvision ----------------------------------------------------------------------------------


@pytest.fixture
def torchvision_folder(monkeypatch, tmp_path):
    import torch

    spec = importlib.machinery.ModuleSpec("torchvision", loader=None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "_C.so").touch()
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.ops, "torchvision", types.SimpleNamespace())
    return loaded


def test_torchvision_that_loads_is_left_alone(torchvision_folder, monkeypatch):
    import torch

    torch.ops.torchvision.nms = "compiled"
    monkeypatch.setattr(torch.library, "Library", None)  # calling it would raise
    assert finds_nothing(libraries.torchvision_operators)
    assert torchvision_folder[0].endswith("_C.so")


def test_torchvision_that_does_not_load(torchvision_folder, monkeypatch):
    import torch

    def fail(path):
        raise OSError("undefined symbol")

    defined = []
    library = types.SimpleNamespace(define=defined.append)
    monkeypatch.setattr(torch.ops, "load_library", fail)
    monkeypatch.setattr(torch.library, "Library", lambda *args: library)
    # Puts the real one back: its declarations end with it, over which torch.export stumbles.
    monkeypatch.setattr(libraries.torchvision_operators, "library", None, raising=False)
    patch = libraries.torchvision_operators()
    next(patch)
    assert [schema.partition("(")[0] for schema in defined] == ["nms", "qnms"]


# --- numpy ----------------------------------------------------------------------------------------


def test_numpy_with_bool8_is_left_alone(monkeypatch, recwarn):
    import numpy as np

    monkeypatch.setattr(np, "bool8", np.bool_, raising=False)
    assert finds_nothing(libraries.numpy_bool8)
    assert np.bool8 is np.bool_
    assert not recwarn.list


def test_numpy_bool8_is_there_during_the_import_only(monkeypatch):
    import numpy as np

    monkeypatch.delattr(np, "bool8", raising=False)
    patch = libraries.numpy_bool8()
    next(patch, None)
    assert np.bool8 is np.bool_
    next(patch, None)
    assert not hasattr(np, "bool8")


# --- mmcv -----------------------------------------------------------------------------------------


def test_full_mmcv_is_left_alone(monkeypatch):
    fake_package(monkeypatch, "mmcv")
    compiled = fake_package(monkeypatch, "mmcv._ext", nms="compiled")
    assert finds_nothing(libraries.mmcv_compiled_operators)
    assert sys.modules["mmcv._ext"] is compiled


def test_mmcv_lite_stand_in(monkeypatch):
    fake_package(monkeypatch, "mmcv")
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    patch = libraries.mmcv_compiled_operators()
    next(patch)
    extension = importlib.import_module("mmcv._ext")
    assert not hasattr(extension, "__spec_of_something__")
    with pytest.raises(ImportError, match=r"mmcv._ext.nms is used.*full mmcv.*pip install"):
        extension.nms(1, 2)
    next(patch, None)
    assert "mmcv._ext" not in sys.modules


# --- diffusers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "module"),
    [
        (libraries.diffusers_unet_module, "diffusers.models.unet_2d_condition"),
        (libraries.diffusers_paint_by_example, "diffusers.pipelines.paint_by_example"),
    ],
)
def test_old_diffusers_is_left_alone(patch, module, monkeypatch):
    importlib.import_module(module.rpartition(".")[0])
    old = fake_package(monkeypatch, module)
    assert finds_nothing(patch)
    assert sys.modules[module] is old


@pytest.mark.parametrize(
    ("patch", "module", "name"),
    [
        (
            libraries.diffusers_unet_module,
            "diffusers.models.unet_2d_condition",
            "UNet2DConditionOutput",
        ),
        (
            libraries.diffusers_paint_by_example,
            "diffusers.pipelines.paint_by_example",
            "PaintByExampleImageEncoder",
        ),
    ],
)
def test_new_diffusers(patch, module, name, without):
    importlib.import_module("diffusers.models.unets.unet_2d_condition")
    without(module)
    before = dict(sys.modules)
    running = patch()
    next(running)
    assert isinstance(getattr(importlib.import_module(module), name), type)
    next(running, None)
    assert sys.modules.get(module) is before.get(module)


class LazyPackage(types.ModuleType):
    """Like diffusers': a name is imported when it is asked for."""

    def __dir__(self):
        return ["Good", "Broken"]

    def __getattr__(self, name):
        if name == "Good":
            return type("Good", (), {})
        raise RuntimeError(f"Failed to import {self.__name__}.{name}")


def test_diffusers_with_a_broken_pipeline(monkeypatch):
    import diffusers

    pipelines = LazyPackage("diffusers.pipelines")
    monkeypatch.setattr(diffusers, "pipelines", pipelines)
    monkeypatch.setattr(diffusers, "models", LazyPackage("diffusers.models"))
    patch = libraries.diffusers_broken_names()
    next(patch)
    assert {name: getattr(pipelines, name) is None for name in dir(pipelines)} == {
        "Good": False,
        "Broken": True,
    }
    next(patch, None)
    with pytest.raises(RuntimeError, match=r"Failed to import diffusers.pipelines.Broken"):
        _ = pipelines.Broken


def test_diffusers_that_imports_is_left_alone(monkeypatch):
    import diffusers

    whole = types.SimpleNamespace(Good=object)
    monkeypatch.setattr(diffusers, "pipelines", whole)
    monkeypatch.setattr(diffusers, "models", whole)
    assert finds_nothing(libraries.diffusers_broken_names)
    assert whole == types.SimpleNamespace(Good=object)


# --- transformers ---------------------------------------------------------------------------------


def test_transformers_with_text_model_is_left_alone(monkeypatch):
    import transformers

    class Old:
        def __init__(self, config):
            self.text_model = "inside"

    monkeypatch.setattr(transformers, "CLIPTextModel", Old)
    assert finds_nothing(libraries.transformers_text_model)
    assert "text_model" not in vars(Old)


def test_transformers_without_text_model(monkeypatch):
    import torch
    import transformers

    class New:
        def __init__(self, config):
            torch.rand(())  # as the initialisation of weights does

    monkeypatch.setattr(transformers, "CLIPTextModel", New)
    before = torch.get_rng_state()
    next(libraries.transformers_text_model())
    assert torch.equal(torch.get_rng_state(), before)
    model = New(None)
    assert model.text_model is model


def test_transformers_with_a_feature_extractor_is_left_alone(monkeypatch):
    name = "transformers.models.clip.feature_extraction_clip"
    importlib.import_module("transformers.models.clip")
    old = fake_package(monkeypatch, name)
    assert finds_nothing(libraries.transformers_feature_extractor)
    assert sys.modules[name] is old


def test_the_safety_checker_of_mmagic_can_be_saved_and_loaded(tmp_path):
    import torch
    from transformers import CLIPConfig

    name = "mmagic.models.editors.stable_diffusion.clip_wrapper"
    wrapper = pytest.importorskip(name)
    tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    images = dict(tiny, image_size=16, patch_size=8)
    config = CLIPConfig(text_config=tiny, vision_config=images, projection_dim=4)
    checker = wrapper.StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.fill_(2)  # a cosine is never above: nothing is censored
    checker.special_care_embeds_weights.fill_(2)
    checker.save_pretrained(tmp_path)
    loaded = wrapper.StableDiffusionSafetyChecker.from_pretrained(tmp_path).eval()
    for key, value in checker.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    pixels = torch.rand(2, 3, 16, 16)
    for weight, found in ((2, [False, False]), (-2, [True, True])):
        loaded.concept_embeds_weights.data.fill_(weight)
        censored, flags = loaded(pixels, torch.ones(2, 16, 16, 3))
        assert flags == found
        assert bool(censored.any()) is not found[0]
    assert "transformers.models.clip.feature_extraction_clip" not in sys.modules


# --- controlnet_aux and mediapipe -----------------------------------------------------------------


def test_mediapipe_with_solutions_is_left_alone(monkeypatch):
    fake_package(monkeypatch, "mediapipe", solutions="here")
    assert finds_nothing(libraries.mediapipe_solutions)


def test_no_mediapipe_is_left_alone(without):
    without("mediapipe")
    assert finds_nothing(libraries.mediapipe_solutions)


def test_mediapipe_without_solutions_is_hidden_during_the_import_only(monkeypatch):
    mediapipe = fake_package(monkeypatch, "mediapipe")
    patch = libraries.mediapipe_solutions()
    next(patch)
    with pytest.raises(ImportError):
        import mediapipe as _  # noqa: F401
    next(patch, None)
    assert sys.modules["mediapipe"] is mediapipe


def test_mediapipe_that_cannot_start_is_hidden(monkeypatch, tmp_path):
    (tmp_path / "mediapipe.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mediapipe", raising=False)
    patch = libraries.mediapipe_solutions()
    next(patch)
    assert sys.modules["mediapipe"] is None
    next(patch, None)
    assert "mediapipe" not in sys.modules


OPTIONAL = pytest.mark.parametrize(
    ("patch", "module", "uses"),
    [
        (
            libraries.controlnet_aux_missing,
            "controlnet_aux",
            [lambda m: m.HEDdetector(), lambda m: m.HEDdetector.from_pretrained("anything")],
        ),
        (
            libraries.albumentations_missing,
            "albumentations",
            [lambda m: m.Compose([m.HorizontalFlip()])],
        ),
    ],
)


@OPTIONAL
def test_optional_package_that_imports_is_left_alone(patch, module, uses, monkeypatch):
    real = fake_package(monkeypatch, module)
    assert finds_nothing(patch)
    assert sys.modules[module] is real


@OPTIONAL
def test_optional_package_missing(patch, module, uses, without):
    without(module)
    running = patch()
    next(running)
    stand_in = importlib.import_module(module)
    next(running, None)
    assert sys.modules[module] is None  # as it was
    for use in uses:
        with pytest.raises(ImportError, match=f"{module}.* is used here, .*pip install {module}"):
            use(stand_in)


# --- setuptools -----------------------------------------------------------------------------------


@pytest.fixture
def package_utils(monkeypatch):
    """mmengine's functions, put back afterwards wherever they were replaced."""
    pytest.importorskip("mmengine")
    import mmengine.config.config  # noqa: F401
    from mmengine.utils import package_utils

    for name in ("is_installed", "package2module", "get_installed_path"):
        function = getattr(package_utils, name)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("mmengine") and vars(module).get(name) is function:
                monkeypatch.setattr(module, name, function)
    return package_utils


def test_pkg_resources_that_is_there_is_used(monkeypatch):
    fake_package(monkeypatch, "pkg_resources")
    assert finds_nothing(libraries.mmengine_pkg_resources)


def test_without_pkg_resources(package_utils, without, tmp_path, monkeypatch):
    import mmengine
    from mmengine.config import config

    without("pkg_resources")
    patch = libraries.mmengine_pkg_resources()
    next(patch)
    next(patch, None)
    assert config.get_installed_path is package_utils.get_installed_path
    assert mmengine.utils.is_installed is package_utils.is_installed
    assert package_utils.is_installed("mmengine")
    assert not package_utils.is_installed("no-such-package")
    assert package_utils.get_installed_path("mmengine") == mmengine.__path__[0]
    assert package_utils.package2module("mmcv-lite") == "mmcv"
    assert package_utils.get_installed_path("mmcv-lite").endswith("mmcv")
    (tmp_path / "not_distributed.py").touch()  # importable, but no installed distribution
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert package_utils.get_installed_path("not_distributed") == str(tmp_path)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        package_utils.get_installed_path("no-such-package")


# --- MMagic ---------------------------------------------------------------------------------------


def run_patch(patch):
    for _ in patch():
        pass


def test_scheduler_wrappers_can_be_copied(monkeypatch):
    class Wrapper:
        def __init__(self):
            self.scheduler = types.SimpleNamespace(steps=5)

        def __getattr__(self, name):  # as MMagic has it
            return getattr(self.scheduler, name)

    fake_package(monkeypatch, "mmagic")
    fake_package(monkeypatch, "mmagic.models")
    name = "mmagic.models.diffusion_schedulers"
    fake_package(monkeypatch, name, SchedulerWrapper=Wrapper)
    with pytest.raises(RecursionError):
        copy.deepcopy(Wrapper())
    run_patch(of_mmagic.mmagic_scheduler_copies)
    copied = copy.deepcopy(Wrapper())
    assert copied.steps == 5
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(copied, "nonsense")  # noqa: B009
    patched = Wrapper.__getattr__
    run_patch(of_mmagic.mmagic_scheduler_copies)  # nothing to patch any more
    assert Wrapper.__getattr__ is patched


@pytest.mark.parametrize(
    ("editor", "patch"),
    [
        ("stable_diffusion", of_mmagic.mmagic_step_options),
        ("stable_diffusion_xl", of_mmagic.mmagic_step_options_xl),
        ("animatediff", of_mmagic.mmagic_step_options_animatediff),
    ],
)
def test_the_scheduler_that_steps_is_asked_what_a_step_takes(monkeypatch, editor, patch):
    class Model:
        def __init__(self, scheduler, test_scheduler):
            self.scheduler, self.test_scheduler = scheduler, test_scheduler

        def prepare_extra_step_kwargs(self, generator, eta):  # as MMagic has it
            taken = inspect.signature(self.scheduler.step).parameters
            given = {"eta": eta, "generator": generator}
            return {name: value for name, value in given.items() if name in taken}

    packages = ["mmagic", "mmagic.models", "mmagic.models.editors"]
    for name in (*packages, f"mmagic.models.editors.{editor}"):
        fake_package(monkeypatch, name)
    name = f"mmagic.models.editors.{editor}.{editor}"
    Model.__module__ = name
    fake_package(monkeypatch, name, Model=Model)

    ddim = types.SimpleNamespace(step=lambda sample, eta, generator: sample)
    euler = types.SimpleNamespace(step=lambda sample, s_churn, generator: sample)
    plain = types.SimpleNamespace(step=lambda sample: sample)
    both, one = {"eta": 0.5, "generator": 7}, {"generator": 7}
    assert Model(ddim, plain).prepare_extra_step_kwargs(7, 0.5) == both  # which plain cannot take
    run_patch(patch)
    for trained, given in ((ddim, [both, one, {}]), (euler, [one, one, {}]), (plain, [{}] * 3)):
        # What either can take: FastComposer, which inherits this, steps with the training's.
        models = [Model(trained, tested) for tested in (ddim, euler, plain)]
        assert [model.prepare_extra_step_kwargs(7, 0.5) for model in models] == given
    patched = Model.prepare_extra_step_kwargs
    run_patch(patch)  # nothing to patch any more
    assert Model.prepare_extra_step_kwargs is patched


def test_attention_injection_passes_on_what_it_lacks(monkeypatch):
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

    fake_package(monkeypatch, "mmagic")
    fake_package(monkeypatch, "mmagic.models")
    fake_package(monkeypatch, "mmagic.models.archs")
    name = "mmagic.models.archs.attention_injection"
    fake_package(monkeypatch, name, AttentionInjection=Wrapper)
    run_patch(of_mmagic.mmagic_attention_injection)
    wrapper = copy.deepcopy(Wrapper(torch.nn.Conv2d(3, 4, 1)))
    assert wrapper.in_channels == 3
    assert wrapper.unet.out_channels == 4
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(wrapper, "nonsense")  # noqa: B009
    patched = Wrapper.__getattr__
    run_patch(of_mmagic.mmagic_attention_injection)
    assert Wrapper.__getattr__ is patched


def test_inferencers_of_configs_without_a_test(monkeypatch):
    class Inferencer:
        def _init_pipeline(self, cfg):  # as MMagic has it
            if "test_dataloader" in cfg and "dataset" in cfg.test_dataloader:
                return cfg.test_dataloader.dataset
            return None

    for name in ("mmagic", "mmagic.apis", "mmagic.apis.inferencers"):
        fake_package(monkeypatch, name)
    name = "mmagic.apis.inferencers.base_mmagic_inferencer"
    fake_package(monkeypatch, name, BaseMMagicInferencer=Inferencer)
    run_patch(of_mmagic.mmagic_inferencer_without_test_data)
    config = pytest.importorskip("mmengine").Config
    assert Inferencer()._init_pipeline(config(dict(test_dataloader=None))) is None
    assert Inferencer()._init_pipeline(config(dict(test_dataloader=dict(dataset=5)))) == 5
    patched = Inferencer._init_pipeline
    run_patch(of_mmagic.mmagic_inferencer_without_test_data)
    assert Inferencer._init_pipeline is patched


def test_a_placeholder_of_several_vectors_is_decoded_as_its_name(tmp_path):
    import tiny

    archs = pytest.importorskip("mmagic.models.archs")
    tiny._write_tokenizer(tmp_path, 1024)
    tokenizer = archs.TokenizerWrapper(str(tmp_path))
    tokenizer.add_placeholder_token("emoji", num_vec_per_token=3)
    tokenizer.add_placeholder_token("style")
    numbers = tokenizer.encode("a emoji in style").input_ids
    assert numbers[2:5] == [1024, 1025, 1026]
    assert "emoji_2" in tokenizer.decode(numbers, return_raw=True)
    texts = [
        tokenizer.decode(numbers),
        *tokenizer.replace_text_with_placeholder_tokens(["emoji_0 emoji_1 emoji_2"]),
    ]
    for text in texts:
        assert "emoji" in text and "emoji_" not in text
    patched = archs.TokenizerWrapper.replace_text_with_placeholder_tokens
    run_patch(of_mmagic.mmagic_placeholder_tokens)  # nothing to patch any more
    assert archs.TokenizerWrapper.replace_text_with_placeholder_tokens is patched


# --- the list of them -----------------------------------------------------------------------------


def test_a_failing_patch_warns_and_does_not_stop_the_import(monkeypatch):
    @patch_of("tome_no_such_module")
    def broken():
        """A symptom: "text"."""
        raise RuntimeError("oops")
        yield

    PATCHES.remove(broken)
    monkeypatch.setitem(
        compat._ENTRIES, "broken", compat.Entry("broken", "", "waiting", broken.module)
    )
    ran = []
    says = r"'broken' of tome_no_such_module failed.*oops"
    with pytest.warns(RuntimeWarning, match=says), compat._applying(broken):
        ran.append(True)
    assert ran
    assert compat._ENTRIES["broken"].status == "failed"
    assert compat._ENTRIES["broken"].detail == "RuntimeError: oops"


def test_apply_is_idempotent():
    import copy

    before = copy.copy(compat._ENTRIES)
    finders = list(sys.meta_path)
    compat.apply()
    compat.apply()
    assert before == compat._ENTRIES
    assert sys.meta_path == finders


def test_a_failed_call_leaves_no_reference_behind(monkeypatch):
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = torch.nn.Sequential(torch.nn.Identity())
            self.unet[0].bank = []

        def forward(self, x, ref_x=None):
            if ref_x is not None:
                self.unet[0].bank.append(ref_x)
            if x is None:
                raise MemoryError
            bank, self.unet[0].bank = self.unet[0].bank, []
            return bank

    fake_package(monkeypatch, "mmagic")
    fake_package(monkeypatch, "mmagic.models")
    fake_package(monkeypatch, "mmagic.models.archs")
    name = "mmagic.models.archs.attention_injection"
    fake_package(monkeypatch, name, AttentionInjection=Wrapper)

    def after_a_failure():
        wrapper = Wrapper()
        with pytest.raises(MemoryError):
            wrapper(None, ref_x="of the call that failed")
        return wrapper(0, ref_x="own")

    assert after_a_failure() == ["of the call that failed", "own"]
    run_patch(of_mmagic.mmagic_attention_bank)
    assert after_a_failure() == ["own"]
    patched = Wrapper.forward
    run_patch(of_mmagic.mmagic_attention_bank)  # nothing to patch any more
    assert Wrapper.forward is patched


# --- checkpoints of mmengine ----------------------------------------------------------------------


class NotDeclared:
    """What a checkpoint should not be able to bring in."""


class Reaching:
    """Pickled as ``getattr`` of something else than logs."""

    def __reduce__(self):
        return getattr, (collections.OrderedDict, "fromkeys")


@pytest.fixture
def nothing_declared():
    """torch as in a new process, without what was declared harmless."""
    import torch

    pytest.importorskip("mmengine.runner.checkpoint")
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def test_checkpoints_with_logs_are_loaded(nothing_declared, tmp_path):
    import pickle

    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import checkpoint

    file = str(tmp_path / "iter_1.pth")
    logs = HistoryBuffer([0.5, 0.25], [1, 1])
    runtime = dict(best_score=np.float32(3), dataset=np.array([True, False]))
    saved = dict(state_dict=dict(w=torch.ones(2)), message_hub=dict(loss=logs, **runtime))
    checkpoint.save_checkpoint(saved, file)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.CheckpointLoader.load_checkpoint(file)
    run_patch(libraries.mmengine_resume)
    loaded = checkpoint.CheckpointLoader.load_checkpoint(file)
    assert loaded["message_hub"]["loss"].mean() == 0.375
    assert loaded["message_hub"]["best_score"] == 3
    assert loaded["message_hub"]["dataset"].tolist() == [True, False]
    assert finds_nothing(libraries.mmengine_resume)
    for other, named in ((NotDeclared(), "NotDeclared"), (Reaching(), "fromkeys")):
        checkpoint.save_checkpoint(dict(saved, other=other), file)
        with pytest.raises(pickle.UnpicklingError, match=named):
            checkpoint.CheckpointLoader.load_checkpoint(file)
