# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Each patch alone: it acts on its symptom, leaves no trace that is not needed, and touches nothing
where the symptom is absent (full mmcv, older or matching libraries)."""

import collections
import copy
import importlib
import importlib.machinery
import pickle
import sys
import types

import pytest
import tiny
import torch

from mmagic_tome.mmagic import compat
from mmagic_tome.mmagic.compat import libraries
from mmagic_tome.mmagic.compat.base import PATCHES


def finds_nothing(patch):
    """Whether a patch returns without doing anything."""
    return next(patch(), "nothing") == "nothing"


def fake_package(monkeypatch, name, **attributes):
    """An importable, findable package ``name`` with these attributes."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    vars(module).update(attributes, __path__=[])
    monkeypatch.setitem(sys.modules, name, module)
    return module


def hide(monkeypatch, hidden):
    """Make a module unfindable."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == hidden else real(name)
    )
    for name in [name for name in sys.modules if name.startswith(f"{hidden}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)


def test_every_patch_states_its_symptom():
    assert len(PATCHES) == len({patch.__name__ for patch in PATCHES}) >= 11
    for patch in PATCHES:
        assert 20 < len(patch.symptom) < 120
        assert '"' in patch.symptom, "the error message itself, to be found by a search"


# --- modules that are missing ---------------------------------------------------------------------

# Patch, the module that is missing, a name in it, and the error where that is used; None: a class.
MISSING = [
    ("mmcv_compiled_operators", "mmcv._ext", "nms", r"_ext.nms is used.*full mmcv.*pip install"),
    ("diffusers_unet_module", "diffusers.models.unet_2d_condition", "UNet2DConditionOutput", None),
    (
        "diffusers_paint_by_example",
        "diffusers.pipelines.paint_by_example",
        "PaintByExampleImageEncoder",
        None,
    ),
    ("controlnet_aux_missing", "controlnet_aux", "HEDdetector", "pip install controlnet_aux"),
    ("albumentations_missing", "albumentations", "Compose", "pip install albumentations"),
]


@pytest.mark.parametrize(("name", "module", "attribute", "says"), MISSING)
def test_what_is_missing_is_there_during_the_import_only(
    name, module, attribute, says, monkeypatch
):
    pytest.importorskip(module.partition(".")[0])
    importlib.import_module("diffusers.models.unets.unet_2d_condition")
    hide(monkeypatch, module)
    patch = getattr(libraries, name)()
    next(patch)
    stand_in = importlib.import_module(module)
    found = getattr(stand_in, attribute)
    next(patch, None)
    assert sys.modules[module] is None  # as it was
    if says is None:
        assert isinstance(found, type)
    else:
        assert not hasattr(stand_in, "__spec_of_something__")
        for use in (found, found.from_pretrained):
            with pytest.raises(ImportError, match=says):
                use("anything")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(row[:2] for row in MISSING),
        ("transformers_feature_extractor", "transformers.models.clip.feature_extraction_clip"),
    ],
)
def test_a_module_that_is_there_is_left_alone(name, module, monkeypatch):
    pytest.importorskip(module.rpartition(".")[0] or module)
    real = fake_package(monkeypatch, module)
    assert finds_nothing(getattr(libraries, name))
    assert sys.modules[module] is real


# --- other symptoms of libraries ------------------------------------------------------------------


@pytest.mark.parametrize("loads", [True, False])
def test_compiled_operators_of_torchvision(loads, monkeypatch, tmp_path):
    def load(path):
        assert path == str(tmp_path / "_C.so")
        if not loads:
            raise OSError("undefined symbol")
        torch.ops.torchvision.nms = "compiled"

    spec = importlib.machinery.ModuleSpec("torchvision", loader=None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "_C.so").touch()
    declared = []
    library = types.SimpleNamespace(define=declared.append)
    monkeypatch.setattr(torch.ops, "torchvision", types.SimpleNamespace())
    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr(torch.library, "Library", lambda *args: library)
    # Puts the real one back: its declarations end with it, over which torch.export stumbles.
    monkeypatch.setattr(libraries.torchvision_operators, "library", None, raising=False)
    assert finds_nothing(libraries.torchvision_operators) == loads
    assert [schema.partition("(")[0] for schema in declared] == ([] if loads else ["nms", "qnms"])


def test_numpy_bool8_is_there_during_the_import_only(monkeypatch):
    import numpy as np

    monkeypatch.delattr(np, "bool8", raising=False)
    patch = libraries.numpy_bool8()
    next(patch, None)
    assert np.bool8 is np.bool_
    next(patch, None)
    assert not hasattr(np, "bool8")
    monkeypatch.setattr(np, "bool8", np.bool_, raising=False)
    assert finds_nothing(libraries.numpy_bool8)


class LazyPackage(types.ModuleType):
    """Like diffusers': a name is imported when it is asked for."""

    def __dir__(self):
        return ["Good", "Broken"]

    def __getattr__(self, name):
        if name == "Good":
            return object
        raise RuntimeError(f"Failed to import {self.__name__}.{name}")


def test_diffusers_with_a_broken_pipeline(monkeypatch):
    import diffusers

    pipelines = LazyPackage("diffusers.pipelines")
    monkeypatch.setattr(diffusers, "pipelines", pipelines)
    monkeypatch.setattr(diffusers, "models", LazyPackage("diffusers.models"))
    patch = libraries.diffusers_broken_names()
    next(patch)
    assert pipelines.Good is object and pipelines.Broken is None
    next(patch, None)
    with pytest.raises(RuntimeError, match=r"Failed to import diffusers.pipelines.Broken"):
        _ = pipelines.Broken
    whole = types.SimpleNamespace(Good=object)
    monkeypatch.setattr(diffusers, "pipelines", whole)
    monkeypatch.setattr(diffusers, "models", whole)
    assert finds_nothing(libraries.diffusers_broken_names)


def test_the_text_model_of_transformers(monkeypatch):
    import transformers

    class Old:
        def __init__(self):
            self.text_model = "inside"

    class New:
        pass

    monkeypatch.setattr(transformers, "CLIPTextModel", Old)
    assert finds_nothing(libraries.transformers_text_model) and Old().text_model == "inside"
    monkeypatch.setattr(transformers, "CLIPTextModel", New)
    next(libraries.transformers_text_model())
    model = New()
    assert model.text_model is model


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
    pytest.importorskip("mmengine.runner.checkpoint")
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def test_checkpoints_with_logs_are_loaded(nothing_declared, tmp_path):
    import numpy as np
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import checkpoint

    file = str(tmp_path / "iter_1.pth")
    logs = HistoryBuffer([0.5, 0.25], [1, 1])
    runtime = dict(best_score=np.float32(3), dataset=np.array([True, False]))
    saved = dict(state_dict=dict(w=torch.ones(2)), message_hub=dict(loss=logs, **runtime))
    checkpoint.save_checkpoint(saved, file)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.CheckpointLoader.load_checkpoint(file)
    list(libraries.mmengine_resume())
    loaded = checkpoint.CheckpointLoader.load_checkpoint(file)["message_hub"]
    assert loaded["loss"].mean() == 0.375 and loaded["best_score"] == 3
    assert loaded["dataset"].tolist() == [True, False]
    for other, named in ((NotDeclared(), "NotDeclared"), (Reaching(), "fromkeys")):
        checkpoint.save_checkpoint(dict(saved, other=other), file)
        with pytest.raises(pickle.UnpicklingError, match=named):
            checkpoint.CheckpointLoader.load_checkpoint(file)


# --- MMagic's own classes, as they are after their import -----------------------------------------


def test_the_safety_checker_can_be_saved_and_loaded(tmp_path):
    name = "mmagic.models.editors.stable_diffusion.clip_wrapper"
    kind = pytest.importorskip(name).StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    images = dict(small, image_size=16, patch_size=8)
    checker = kind(CLIPConfig(text_config=small, vision_config=images, projection_dim=4))
    checker.concept_embeds_weights.fill_(2)  # a cosine is never above: nothing is censored
    checker.special_care_embeds_weights.fill_(2)
    checker.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    for key, value in checker.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    for weight, found in ((2, [False, False]), (-2, [True, True])):
        loaded.concept_embeds_weights.data.fill_(weight)
        censored, flags = loaded(torch.rand(2, 3, 16, 16), torch.ones(2, 16, 16, 3))
        assert flags == found and bool(censored.any()) is not found[0]
    assert "transformers.models.clip.feature_extraction_clip" not in sys.modules


def test_schedulers_can_be_copied():
    pytest.importorskip("mmagic.models")
    from mmagic.registry import DIFFUSION_SCHEDULERS

    config = dict(type="DDIMScheduler", num_train_timesteps=50)
    copied = copy.deepcopy(DIFFUSION_SCHEDULERS.build(config))
    assert copied.config.num_train_timesteps == 50
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(copied, "nonsense")  # noqa: B009


@pytest.mark.parametrize("root", ["StableDiffusion", "StableDiffusionXL", "AnimateDiff"])
def test_the_scheduler_that_steps_is_asked_what_a_step_takes(root):
    models = pytest.importorskip("mmagic.models")
    ask = getattr(models, root).prepare_extra_step_kwargs
    ddim = types.SimpleNamespace(step=lambda sample, eta, generator: sample)
    euler = types.SimpleNamespace(step=lambda sample, s_churn, generator: sample)
    plain = types.SimpleNamespace(step=lambda sample: sample)
    both, one = {"eta": 0.5, "generator": 7}, {"generator": 7}
    for trained, given in ((ddim, [both, one, {}]), (euler, [one, one, {}]), (plain, [{}] * 3)):
        # What either can take: FastComposer, which inherits this, steps with the training's.
        for tested, expected in zip((ddim, euler, plain), given):
            model = types.SimpleNamespace(scheduler=trained, test_scheduler=tested)
            assert ask(model, 7, 0.5) == expected


def test_attention_injection_passes_on_what_it_lacks():
    wrapper = pytest.importorskip("mmagic.models.archs.attention_injection").AttentionInjection
    wrapped = wrapper(tiny.tiny_unet())
    for one in (wrapped, copy.deepcopy(wrapped)):
        assert one.in_channels == 4 and one.unet.config.out_channels == 4
        with pytest.raises(AttributeError, match="nonsense"):
            getattr(one, "nonsense")  # noqa: B009


def test_inferencers_of_configs_without_a_test():
    name = "mmagic.apis.inferencers.base_mmagic_inferencer"
    read = pytest.importorskip(name).BaseMMagicInferencer._init_pipeline
    from mmengine import Config

    assert read(None, Config(dict(test_dataloader=None))) is None
    loader = dict(dataset=dict(pipeline=[]))
    assert read(None, Config(dict(test_dataloader=loader))).transforms == []


def test_a_placeholder_of_several_vectors_is_decoded_as_its_name(tmp_path):
    archs = pytest.importorskip("mmagic.models.archs")
    tiny._write_tokenizer(tmp_path, 1024)
    tokenizer = archs.TokenizerWrapper(str(tmp_path))
    tokenizer.add_placeholder_token("emoji", num_vec_per_token=3)
    tokenizer.add_placeholder_token("style")
    numbers = tokenizer.encode("a emoji in style").input_ids
    assert numbers[2:5] == [1024, 1025, 1026]
    assert "emoji_2" in tokenizer.decode(numbers, return_raw=True)
    texts = tokenizer.replace_text_with_placeholder_tokens(["emoji_0 emoji_1 emoji_2"])
    for text in (tokenizer.decode(numbers), *texts):
        assert "emoji" in text and "emoji_" not in text


# --- the list of them -----------------------------------------------------------------------------


def test_a_failing_patch_warns_and_does_not_stop_the_import(monkeypatch):
    def broken():
        raise RuntimeError("oops")
        yield

    broken.module = "tome_no_such_module"
    monkeypatch.setitem(compat._STATUS, "broken", "waiting")
    ran = []
    says = r"'broken' of tome_no_such_module failed.*oops"
    with pytest.warns(RuntimeWarning, match=says), compat._applying(broken):
        ran.append(True)
    assert ran and compat._STATUS["broken"] == "failed: RuntimeError: oops"


def test_apply_is_idempotent():
    before, finders = dict(compat._STATUS), list(sys.meta_path)
    compat.apply()
    assert before == compat._STATUS and sys.meta_path == finders
