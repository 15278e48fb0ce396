# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Complete pipelines of diffusers with random weights, as folders that ``from_pretrained`` loads.

Text encoders and tokenizers are in them too, so what reads these folders is what reads the
published ones. Images of 64x64 have 8x8 latents.
"""

from pathlib import Path

import diffusers
import torch
import transformers
from tiny import _write_tokenizer, randomise, tiny_clip_config
from tiny_pipelines import pipeline_of, sd_parts, xl_parts
from tiny_transformers import TRANSFORMERS
from tiny_unets import tiny_controlnet, tiny_vae

_VOCABULARY = 1024
# Text of T5, and two texts of CLIP after one another, which SD3 pads to the width of T5's.
_WIDTH = 32
_CLIP_WIDTH = 16


def pipeline_folder(name, path):
    """Write one of :data:`NAMES` to a folder, created if it is not there; return the folder."""
    class_name, build = _KINDS[name]
    torch.manual_seed(0)
    pipeline = pipeline_of(class_name, **build(Path(path)))
    pipeline.save_pretrained(path)
    return str(path)


# --- text -----------------------------------------------------------------------------------------


def _texts(folder, *kinds):
    """Tokenizers and text encoders: components with the names of pipelines."""
    parts = {}
    for kind, ending in zip(kinds, ("", "_2", "_3")):
        made = _t5(kind) if "T5" in kind else _clip(folder / f"tokenizer{ending}", kind)
        parts[f"tokenizer{ending}"], parts[f"text_encoder{ending}"] = made
    return parts


def _clip(folder, kind):
    """A tokenizer and a text encoder of CLIP's kind, 16 tokens of width 16."""
    _write_tokenizer(folder, _VOCABULARY)
    config = transformers.CLIPTextConfig(**tiny_clip_config(_VOCABULARY))
    encoder = randomise(getattr(transformers, kind)(config))
    return transformers.CLIPTokenizer.from_pretrained(folder), encoder


def _t5(kind):
    """A tokenizer that knows letters, and a text encoder of T5's kind, of width 32."""
    letters = [(chr(number), -3.0) for number in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=32)
    options = dict(d_model=_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(vocabulary), **options)
    return tokenizer, randomise(getattr(transformers, f"{kind}EncoderModel")(config))


_CLIP, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


# --- pipelines ------------------------------------------------------------------------------------


def _v1(folder, **unet):
    return {**sd_parts(**unet), **_texts(folder, _CLIP)}


def _sdxl(folder):
    parts = xl_parts(scheduler="DDIMScheduler", cross_attention_dim=2 * _CLIP_WIDTH)
    return {**parts, **_texts(folder, _CLIP, _PROJECTED)}


def _dit(title, folder, *texts, vae=None, scheduler=None, **changes):
    """A pipeline around a network of tiny_transformers.py, changed."""
    return dict(
        **_texts(folder, *texts),
        transformer=TRANSFORMERS[title].changed(**changes).build(),
        vae=vae or tiny_vae(shift_factor=0.1),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _sd3(folder):
    texts = (_PROJECTED, _PROJECTED, "T5")
    widths = dict(joint_attention_dim=_WIDTH, pooled_projection_dim=2 * _CLIP_WIDTH)
    return _dit("Stable Diffusion 3", folder, *texts, sample_size=8, **widths)


def _flux(folder):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    channels = dict(in_channels=16, out_channels=16)  # four latents of four channels
    widths = dict(joint_attention_dim=_WIDTH, pooled_projection_dim=_CLIP_WIDTH)
    return _dit("Flux.1", folder, _CLIP, "T5", scheduler=scheduler, **channels, **widths)


def _pixart(folder):
    parts = dict(vae=tiny_vae(), scheduler=diffusers.DPMSolverMultistepScheduler())
    # Its pipeline generates at sizes that it knows, of 256 pixels here, and resizes the image.
    widths = dict(sample_size=32, caption_channels=_WIDTH)
    return _dit("PixArt-alpha, PixArt-sigma", folder, "T5", **parts, **widths)


def _wan(folder, **changes):
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    options = dict(vae=randomise(vae), scheduler=scheduler, text_dim=_WIDTH)
    return _dit("Wan 2.1, 2.2 (video)", folder, "UMT5", **options, **changes)


def _wan22(folder):
    """One network for the first half of a run, another for the second."""
    second = _wan(folder, num_layers=1)["transformer"]
    return dict(**_wan(folder), transformer_2=second, boundary_ratio=0.8)


_KINDS = {
    "sd": ("StableDiffusionPipeline", _v1),
    "img2img": ("StableDiffusionImg2ImgPipeline", _v1),
    "inpaint": ("StableDiffusionInpaintPipeline", lambda folder: _v1(folder, in_channels=9)),
    "controlnet": (
        "StableDiffusionControlNetPipeline",
        lambda folder: dict(**_v1(folder), controlnet=tiny_controlnet()),
    ),
    "sdxl": ("StableDiffusionXLPipeline", _sdxl),
    "sd3": ("StableDiffusion3Pipeline", _sd3),
    "flux": ("FluxPipeline", _flux),
    "pixart": ("PixArtSigmaPipeline", _pixart),
    "wan": ("WanPipeline", _wan),
    "wan22": ("WanPipeline", _wan22),
}
NAMES = tuple(_KINDS)
