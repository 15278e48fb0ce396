#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Operations of one step of MMagic's models, baseline and with the tome_cfg of a config.

Counted, not timed: networks of the published shapes on PyTorch's ``meta`` device, without weights.
One step is a batch of two, as in classifier-free guidance; with ``plan_interval`` it is the mean of
that many steps. Writes ``data/operations.json``::

    python benchmarks/operations.py configs/*/*_tome-*.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine import Config

from mmagic_tome import ToMeConfig, apply_tome, runs
from mmagic_tome.fits import Fit
from mmagic_tome.lab.measure import count_flops
from mmagic_tome.lab.networks import NETWORKS
from mmagic_tome.lab.report import save_record

SDXL = dict(NETWORKS["sdxl"].arguments, sample_size=128)
FRAMES = 16


def build(model: Config) -> tuple[Any, Any, dict[str, Any]]:
    """The network of a config's model, its ControlNet or None, and the arguments of a call."""
    from diffusers import ControlNetModel, UNet2DConditionModel
    from mmagic.registry import MODELS

    kind, control = model.type, None
    channels = 9 if kind == "StableDiffusionInpaint" else 4
    shape = (2, channels, 128, 128) if kind == "StableDiffusionXL" else (2, channels, 64, 64)
    x, t, text = torch.empty(shape), torch.tensor(500), torch.empty(2, 77, 768)
    call = dict(sample=x, timestep=t, encoder_hidden_states=text)
    if kind == "AnimateDiff":
        own = {k: v for k, v in model.unet.items() if k not in ("from_pretrained", "subfolder")}
        network = MODELS.build(dict(own, cross_attention_dim=768))
        call["sample"] = torch.empty(2, channels, FRAMES, 64, 64)
    elif model.unet.type == "DenoisingUnet":
        network = MODELS.build(model.unet)
        call = dict(x_t=x, t=t, encoder_hidden_states=text)
    elif kind == "StableDiffusionXL":
        network = UNet2DConditionModel(**SDXL)
        call["encoder_hidden_states"] = torch.empty(2, 77, 2048)
        added = dict(text_embeds=torch.empty(2, 1280), time_ids=torch.empty(2, 6))
        call["added_cond_kwargs"] = added
    else:
        network = UNet2DConditionModel(in_channels=channels, cross_attention_dim=768)
    if kind.startswith("ControlStableDiffusion"):
        control = ControlNetModel(cross_attention_dim=768)
    return network.eval(), control, call


def run(network: Any, control: Any, call: dict[str, Any], steps: int) -> None:
    """Calls at falling timesteps."""
    for index in range(steps):
        if steps > 1:  # what depends on the step reads the timestep: it has to be a number
            call = dict(call, timestep=999 - index)
        more = {}
        if control is not None:
            image = torch.empty(2, 3, 512, 512, device="meta")
            down, mid = control(**call, controlnet_cond=image, return_dict=False)
            more = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        network(**call, **more)


def count(file: str) -> dict[str, Any]:
    """The row of a config."""
    config = Config.fromfile(file)
    options = ToMeConfig.coerce(config.tome_cfg)
    with torch.device("meta"):
        network, control, call = build(config.model)
    interval = options.plan_interval
    steps = interval if isinstance(interval, int) else interval[-1] + 1

    def step() -> None:
        run(network, control, call, steps)

    baseline = count_flops(step) / steps
    handles = [apply_tome(network, options.replace(controlnet=False))]
    if options.controlnet_config is not None:
        handles.append(apply_tome(control, options.controlnet_config))
    # Tensors without data cannot be compared: every call continues the run.
    fits = dict(
        same_input=lambda *_: False, fit=lambda run, _: Fit(0.0, dict.fromkeys(run.branches, 1.0))
    )
    with mock.patch.multiple(runs.Run, **fits), mock.patch("torch.equal", return_value=True):
        merged = count_flops(step) / steps
    assert all(row["kept"] < row["tokens"] for handle in handles for row in handle.stats())
    path = Path(file)
    pixels = f"{8 * call.get('sample', call.get('x_t')).shape[-1]}²"
    pixels += f", {FRAMES} frames" if config.model.type == "AnimateDiff" else ""
    row = {"folder": path.parent.name, "config": path.stem, "image": pixels}
    return row | {"baseline": baseline, "merged": merged}


if __name__ == "__main__":
    rows = []
    for name in sys.argv[1:]:
        rows.append(count(name))
        print(rows[-1], flush=True)
    settings = dict(model="shapes of the published models, no weights", batch_size=2)
    save_record(Path(__file__).parent / "data/operations.json", settings, rows)
