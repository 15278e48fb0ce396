# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Patches alone. Those without which MMagic cannot be imported, copied or used at all act in every
other test of it, and test_environments.py looks at what they leave behind."""

import collections
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


def finds_nothing(patch):
    """Whether a patch returns without doing anything."""
    return next(patch(), "nothing") == "nothing"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("mmcv_compiled_operators", "mmcv._ext"),
        ("diffusers_unet_module", "diffusers.models.unet_2d_condition"),
        ("diffusers_paint_by_example", "diffusers.pipelines.paint_by_example"),
        ("transformers_feature_extractor", "transformers.models.clip.feature_extraction_clip"),
        ("controlnet_aux_missing", "controlnet_aux"),
        ("albumentations_missing", "albumentations"),
    ],
)
def test_a_module_that_is_there_is_left_alone(name, module, monkeypatch):
    pytest.importorskip(module.rpartition(".")[0] or module)
    real = types.ModuleType(module)
    real.__spec__ = importlib.machinery.ModuleSpec(module, loader=None)
    monkeypatch.setitem(sys.modules, module, real)
    assert finds_nothing(getattr(libraries, name))
    assert sys.modules[module] is real


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
