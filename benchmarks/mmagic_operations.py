# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Operations of one step of MMagic's models, dense and with the tome_cfg of a config.

Counted, not timed: the networks have the layout and the widths of the real ones and neither weights
nor data (PyTorch's ``meta`` device), so nothing is computed or downloaded. A multiply-add counts
two; the products by which merging finds similar tokens are counted, gathering and element-wise work
is not. One step is a batch of two, without and with the text, as in classifier-free guidance; where
a config has ``plan_interval``, figures are the mean of that many steps.

    python benchmarks/mmagic_operations.py configs/*/*_tome-*.py
"""

import argparse
from pathlib import Path
from unittest import mock

import torch

import mmagic_tome  # noqa: F401  (before diffusers, which it may have to repair)

# What MMagic's configs take from hubs: the layouts that the authors published.
_LAYOUTS = {
    "StableDiffusionInpaint": dict(in_channels=9),
    "StableDiffusionXL": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    ),
}
_FRAMES = 16


def build(model):
    """(network, ControlNet or None, arguments of a call, size in pixels) of a config's model."""
    from diffusers import ControlNetModel, UNet2DConditionModel
    from mmagic.registry import MODELS

    kind = model.type
    size = 128 if kind == "StableDiffusionXL" else 64
    layout = dict(cross_attention_dim=768, **{}) | _LAYOUTS.get(kind, {})
    channels, width = layout.get("in_channels", 4), layout["cross_attention_dim"]
    shape = (
        (2, channels, _FRAMES, size, size) if kind == "AnimateDiff" else (2, channels, size, size)
    )
    call = dict(
        sample=torch.empty(shape, device="meta"),
        timestep=torch.tensor(500, device="meta"),
        encoder_hidden_states=torch.empty(2, 77, width, device="meta"),
    )
    control = None
    with torch.device("meta"):
        if kind == "AnimateDiff":
            own = {k: v for k, v in model.unet.items() if k not in ("from_pretrained", "subfolder")}
            network = MODELS.build(dict(own, cross_attention_dim=768))
        elif model.unet.type == "DenoisingUnet":
            network = MODELS.build(model.unet)
            call = dict(
                x_t=call["sample"],
                t=call["timestep"],
                encoder_hidden_states=call["encoder_hidden_states"],
            )
        else:
            network = UNet2DConditionModel(**layout)
        if kind == "StableDiffusionXL":
            added = dict(text_embeds=torch.empty(2, 1280), time_ids=torch.empty(2, 6))
            call["added_cond_kwargs"] = added
        if kind.startswith("ControlStableDiffusion"):
            control = ControlNetModel(cross_attention_dim=768)
    return network, control, call, 8 * size


def run(network, control, call, size, steps):
    """Calls of the networks at falling timesteps."""
    for index in range(steps):
        if steps > 1:  # what depends on the step reads the timestep, so it has to be a number
            call = dict(call, timestep=999 - index)
        step(network, control, call, size)


def step(network, control, call, size):
    """One call of the networks, without data."""
    if control is not None:
        picture = torch.empty(2, 3, size, size, device="meta")
        down, mid = control(**call, controlnet_cond=picture, return_dict=False)
        call = dict(call, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    network(**call)


def count(file):
    """(name, pixels, dense, merged), the latter two in operations."""
    from mmengine import Config

    from mmagic_tome import ToMeConfig, apply_tome, runs
    from mmagic_tome.evaluation.metrics.cost import count_flops

    config = Config.fromfile(str(file))
    options = ToMeConfig.coerce(config.tome_cfg)
    network, control, call, size = build(config.model)
    network.eval()
    interval = options.plan_interval
    steps = interval if isinstance(interval, int) else interval[-1] + 1
    dense = count_flops(run, network, control, call, size, steps)
    handles = [apply_tome(network, options.replace(controlnet=False))]
    if options.controlnet_config is not None:
        handles.append(apply_tome(control, options.controlnet_config))
    # Tensors without data cannot be compared: every call continues the run.
    fits = mock.patch.multiple(
        runs.Run,
        same_input=lambda *_: False,
        fit=lambda run, _: (0.0, dict.fromkeys(run.branches, 1)),
    )
    with fits, mock.patch.object(runs, "_copies", return_value=1):
        merged = count_flops(run, network, control, call, size, steps)
    assert all(row["kept"] < row["tokens"] for handle in handles for row in handle.stats())
    return Path(file).stem, size, dense / steps, merged / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("configs", nargs="+", help="config files with a top-level tome_cfg")
    print("| config | picture | dense, TFLOP | merged, TFLOP | dense / merged |")
    print("|---|---|---|---|---|")
    for file in parser.parse_args().configs:
        name, size, dense, merged = count(file)
        row = f"| {name} | {size}² | {dense / 1e12:.2f} | {merged / 1e12:.2f} "
        print(f"{row}| {dense / merged:.2f} |", flush=True)


if __name__ == "__main__":
    main()
