# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Settings and fixtures for all tests."""

import gc
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

# examples/ and benchmarks/ are imported from the checkout.
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

import mmagic_tome  # noqa: F401  (before diffusers, which it may have to repair)

# One thread: on tensors this small, two that wait for each other on busy cores take
# twenty times as long.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A random Stable Diffusion in diffusers layout; see ``tiny.tiny_sd_folder``."""
    import tiny

    return tiny.tiny_sd_folder(tmp_path_factory.mktemp("tiny_sd"))


@pytest.fixture
def unet():
    """A network with attention on three levels; see ``tiny.tiny_unet``."""
    import tiny

    return tiny.tiny_unet(levels=3)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """Leave what is there out of collections, which take seconds of all that was imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _unshared_extra_parameters(monkeypatch):
    """MMagic's inferencers keep call arguments in a dict of their class; let none leak."""
    module = sys.modules.get("mmagic.apis.inferencers.text2image_inferencer")
    if module is not None:
        inferencer = module.Text2ImageInferencer
        monkeypatch.setattr(inferencer, "extra_parameters", dict(inferencer.extra_parameters))


@pytest.fixture
def no_default_scope(monkeypatch):
    """mmengine as in a new process: other tests have told it to look in MMagic's registry first."""
    from mmengine.registry import DefaultScope

    monkeypatch.setattr(DefaultScope, "_instance_dict", type(DefaultScope._instance_dict)())
