# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The demo model in ComfyUI's own engine, where that is installed: nothing of it is in this
repository."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmagic_tome.assets import asset_path

# Its UNet has 16 groups per norm and heads of two widths; ComfyUI's has constants for both.
_GROUPS, _HEADS = 16, {48: 1, 96: 2, 192: 3}


def engine():
    """ComfyUI's packages ``comfy.*`` by name, on the CPU; the test is skipped without them."""
    folder = os.environ.get("COMFYUI_PATH")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    if importlib.util.find_spec("comfy") is None:
        pytest.skip("ComfyUI is not here; set COMFYUI_PATH to its folder")
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.sample
    import comfy.supported_models
    import comfy.utils

    return comfy


def demo_model(comfy):
    """The demo model as a MODEL."""
    folder = asset_path("demo_model")

    class Operations(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups, *args, **kwargs):
                super().__init__(_GROUPS, *args, **kwargs)

    depth = {
        "transformer_depth": [1, 1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 6,
    }
    options = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 48,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 4],
        "num_heads": 1,
        "num_head_channels": -1,
        "context_dim": 192,
        "use_spatial_transformer": True,
        "legacy": False,
        "dtype": torch.float32,
    }
    config = comfy.supported_models.SD15({**options, **depth})
    config.unet_config = {**options, **depth}
    config.custom_operations = Operations
    schedule = json.loads(Path(folder, "scheduler/scheduler_config.json").read_text())
    config.sampling_settings = {
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "zsnr": schedule["rescale_betas_zero_snr"],
    }
    config.manual_cast_dtype = None
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION)
    names = comfy.utils.unet_to_diffusers({**options, **depth})
    weights = load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")
    weights = {names[name]: value.float() for name, value in weights.items()}
    model.diffusion_model.load_state_dict(weights)
    for module in model.diffusion_model.modules():
        if type(module).__name__ == "CrossAttention":
            width = module.to_q.weight.shape[0]
            module.heads, module.dim_head = _HEADS[width], width // _HEADS[width]
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def texts(*prompts):
    """The conditioning of prompts, as ComfyUI passes it on."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = asset_path("demo_model")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", torch_dtype=torch.float32
    )
    found = []
    for prompt in prompts:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(prompt, max_length=tokenizer.model_max_length, **options)
        with torch.no_grad():
            found.append([[encoder(tokens.input_ids).last_hidden_state, {}]])
    return found
