# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Training, checkpoints and averages of MMagic models with token merging."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmagic")

import mmagic_hub
from mmengine import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import load_checkpoint, save_checkpoint

from mmagic_tome import ToMeConfig, get_handle, remove_tome

OURS = Path(__file__).resolve().parents[2] / "configs"
LORA = "dreambooth/dreambooth-lora_tome-5e-1.py"
CONTROL = "controlnet/controlnet-canny_tome-5e-1_both.py"


def shrunk(name, hub):
    return mmagic_hub.shrink(Config.fromfile(str(OURS / name)), hub)


def assert_the_same(image, expected):
    # Weights that lie elsewhere in memory may tip a value over to the next of 256 levels.
    np.testing.assert_allclose(image, expected, rtol=0, atol=1)


@pytest.mark.parametrize(
    "name",
    [
        "stable_diffusion/stable-diffusion_ddim_tome-5e-1.py",
        CONTROL,
        pytest.param(LORA, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_and_averages(name, hub, build, tmp_path):
    config = shrunk(name, hub)
    given = mmagic_hub.arguments(config.model)
    model = build(config)
    merged = mmagic_hub.infer(model, **given)
    file = str(tmp_path / "model.pth")
    save_checkpoint(dict(state_dict=model.state_dict()), file)

    # The checkpoint knows nothing of merging: a baseline model reads it, and the other way round.
    plain = shrunk(name, hub)
    plain.pop("tome_cfg")
    other = build(plain)
    assert other.tome_handle is None
    assert list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    load_checkpoint(other, file, strict=True)
    baseline = mmagic_hub.infer(other, **given)
    assert np.abs(baseline - merged).max() > 8
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    load_checkpoint(model, file, strict=True)
    assert_the_same(mmagic_hub.infer(model, **given), merged)

    # An average is a copy with token merging of its own.
    average = ExponentialMovingAverage(model, momentum=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    average.update_parameters(model)
    copied = average.module
    assert copied.tome_handle.config == ToMeConfig.coerce(config.tome_cfg)
    load_checkpoint(copied, file, strict=True)
    assert_the_same(mmagic_hub.infer(copied, **given), merged)
    assert remove_tome(copied)
    assert_the_same(mmagic_hub.infer(copied, **given), baseline)
    assert model.tome_handle is not None
    if hasattr(model, "controlnet"):
        assert get_handle(copied.controlnet) is None
        assert get_handle(model.controlnet) is not None
