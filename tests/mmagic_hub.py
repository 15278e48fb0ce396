# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's own configs with tiny weights in place of those on model hubs.

The layout is that of the real models: four levels with two layers each for Stable
Diffusion 1.5, that is the sixteen transformers that ViCo's config counts on, three levels with 0,
2 and 3 blocks a transformer for SDXL. Only the widths are small, and the weights random.
"""

import importlib.util
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image

# Folders of .mim/configs whose models belong to the Stable Diffusion family.
FOLDERS = (
    "stable_diffusion",
    "stable_diffusion_xl",
    "controlnet",
    "controlnet_animation",
    "dreambooth",
    "textual_inversion",
    "vico",
    "fastcomposer",
    "animatediff",
)

# What its text-to-image inferencer can call: a prompt, and a control image. The others need
# arguments that it does not have (ViCo and FastComposer a reference, inpainting a mask).
INFERENCER = {
    "stable_diffusion_xl/stable-diffusion_xl_ddim_tome-5e-1.py": "stable_diffusion",
    "controlnet/controlnet-canny_tome-5e-1_both.py": "controlnet",
    "stable_diffusion/stable-diffusion_ddim_tome-5e-1.py": "stable_diffusion",
    "stable_diffusion/stable-diffusion_ddim_native_tome-5e-1.py": "stable_diffusion",
    "dreambooth/dreambooth_tome-5e-1.py": "stable_diffusion",
    "dreambooth/dreambooth-lora_tome-5e-1.py": "stable_diffusion",
    "textual_inversion/textual_inversion_tome-5e-1.py": "stable_diffusion",
    "animatediff/animatediff_ToonYou_tome-5e-1.py": "stable_diffusion",
}

_WIDTH = 16  # of the text
_UNET = dict(
    block_out_channels=(32, 32, 32, 32),
    layers_per_block=2,
    norm_num_groups=8,
    attention_head_dim=2,
    cross_attention_dim=_WIDTH,
    sample_size=8,
)


def mmagic_configs():
    """'folder/file.py' of every config that MMagic ships for the family, sorted."""
    root = mmagic_folder()
    return sorted(
        str(file.relative_to(root)) for folder in FOLDERS for file in (root / folder).glob("*.py")
    )


def mmagic_folder():
    """Where the installed MMagic keeps its configs; nothing is imported."""
    (package,) = importlib.util.find_spec("mmagic").submodule_search_locations
    return Path(package) / ".mim" / "configs"


def write_hub(folder):
    """Write tiny Stable Diffusions in diffusers layout into a folder (Path); return it.

    Sub-folders ``sd`` (everything of :func:`tiny.tiny_sd_folder`), ``inpaint``, ``xl``,
    ``controlnet``, and the file ``motion.ckpt``.
    """
    from diffusers import ControlNetModel

    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    sd = dict(
        _UNET,
        levels=4,
        down_block_types=(cross, cross, cross, plain),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )
    # ViCo insists on CLIP's own number of words.
    tiny.tiny_sd_folder(folder / "sd", vocabulary=49408)
    unet = tiny.tiny_unet(**sd)
    unet.save_pretrained(folder / "sd" / "unet")
    # AnimateDiff reads this format.
    torch.save(unet.state_dict(), folder / "sd" / "unet" / "diffusion_pytorch_model.bin")
    torch.save({}, folder / "motion.ckpt")
    control = {key: _UNET[key] for key in _UNET if key != "sample_size"}
    control.update(down_block_types=sd["down_block_types"])
    control.update(conditioning_embedding_out_channels=(8, 8, 16, 16))
    tiny.randomise(ControlNetModel(**control)).save_pretrained(folder / "controlnet")

    _link(folder, "inpaint")
    tiny.tiny_unet(**sd, in_channels=9).save_pretrained(folder / "inpaint" / "unet")

    _link(folder, "xl")
    xl = dict(_UNET, **tiny.XL_UNET, transformer_layers_per_block=(1, 2, 3))
    xl.update(block_out_channels=(32, 32, 32), cross_attention_dim=2 * _WIDTH)
    xl.update(down_block_types=(plain, cross, cross))
    xl.update(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    tiny.tiny_unet(levels=3, **xl).save_pretrained(folder / "xl" / "unet")
    return folder


def _link(folder, name):
    """A model with everything but the UNet of ``sd``."""
    (folder / name).mkdir()
    for part in (folder / "sd").iterdir():
        if part.name != "unet":
            (folder / name / part.name).symlink_to(part)


def shrink(config, hub):
    """Replace, in a config of MMagic's, every name on a hub by a folder of :func:`write_hub`;
    return the config."""
    model = config.model
    folder = {"StableDiffusionInpaint": "inpaint", "StableDiffusionXL": "xl"}
    weights = str(hub / folder.get(model.type, "sd"))
    for part in ("unet", "vae", "scheduler", "test_scheduler"):
        if "from_pretrained" in model[part]:
            model[part].from_pretrained = weights
    for part in [key for key in model if key.startswith("text_encoder")]:
        model[part].pretrained_model_name_or_path = weights
    for part in [key for key in model if key.startswith("tokenizer")]:
        model[part] = weights
    if "controlnet" in model:
        key = "from_config" if "from_config" in model.controlnet else "from_pretrained"
        model.controlnet[key] = str(hub / "controlnet")
    if model.get("init_cfg", {}).get("type") == "convert_from_unet":
        model.init_cfg.base_model = dict(
            type="UNet2DConditionModel", from_pretrained=weights, subfolder="unet"
        )
    if "pretrained_cfg" in model:  # FastComposer
        model.pretrained_cfg.update(
            pretrained_model_name_or_path=weights,
            image_encoder=f"{weights}/clip",
            finetuned_model_path="",
            object_resolution=32,
        )
    if model.type == "AnimateDiff":
        model.unet.update(_UNET)
        model.motion_module_cfg.path = str(hub / "motion.ckpt")
        del model.dream_booth_lora_cfg["path"]  # its original layout has no tiny counterpart
    if model.type in ("DreamBooth", "TextualInversion", "ViCo"):
        model.dtype = "fp32"  # theirs is half precision, which is slow on a CPU
    return config


def arguments(model):
    """Keyword arguments for ``infer``, of one 64x64 image in two steps.

    Args:
        model (dict): The ``model`` of a config.
    """
    image, mask = an_image(), Image.fromarray((np.eye(64) * 255).astype(np.uint8))
    of_kinds = {
        "StableDiffusionInpaint": dict(image=image, mask_image=mask),
        "ControlStableDiffusion": dict(control=image),
        "ControlStableDiffusionImg2Img": dict(
            control=image, latent_image=image, reference_img=image
        ),
        "TextualInversion": dict(prompt=f"a {model.get('placeholder_token')}"),
        "ViCo": dict(prompt=f"a {model.get('placeholder')}", image_reference=image),
        "FastComposer": dict(prompt="a cat img", reference_subject_images=[image]),
        "AnimateDiff": dict(video_length=2),
    }
    return {"prompt": "a cat", **tiny.QUICK, **of_kinds.get(model["type"], {})}


def an_image(size=64):
    """Some image of this many pixels a side; always the same."""
    noise = np.random.RandomState(0).randint(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def infer(model, **given):
    """The first image (or the clip) of a call of ``infer``; the same at every call."""
    torch.manual_seed(0)  # some of them have no seed argument
    result = model.infer(**given)
    if isinstance(result, dict):
        result = result["samples"]
    return np.asarray(result[0] if isinstance(result, (list, tuple)) else result, dtype=np.float32)
