# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Complete pipelines of diffusers with random weights, as folders that ``from_pretrained`` loads.

Text encoders and tokenizers are in them too, so what reads these folders is what reads the
published ones. Images of 64x64 have 8x8 latents.
"""

from pathlib import Path

import torch
from tiny import _write_tokenizer, randomise, tiny_unet
from tiny_pipelines import _SCHEDULE, tiny_controlnet, tiny_vae
from tiny_transformers import TRANSFORMERS

_VOCABULARY = 1024
# Text of T5, and two texts of CLIP after one another, which SD3 pads to the width of T5's.
_WIDTH = 32
_CLIP_WIDTH = 16


def pipeline_folder(name, path):
    """Write a pipeline.

    Args:
        name (str): One of :data:`NAMES`.
        path (str | Path): A folder, created if it is not there.

    Returns:
        str: The folder.
    """
    import diffusers

    class_name, build = _KINDS[name]
    torch.manual_seed(0)
    path = Path(path)
    pipeline = getattr(diffusers, class_name)(**build(path))
    pipeline.save_pretrained(path)
    return str(path)


# --- text -----------------------------------------------------------------------------------------


def _clip(folder, name="tokenizer", projection=False):
    """A tokenizer and a text encoder of CLIP's kind, 16 tokens of width 16."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    _write_tokenizer(folder / name, _VOCABULARY)
    config = CLIPTextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=_CLIP_WIDTH,
        bos_token_id=_VOCABULARY - 2,
        eos_token_id=_VOCABULARY - 1,
        pad_token_id=_VOCABULARY - 1,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return CLIPTokenizer.from_pretrained(folder / name), randomise(kind(config))


def _t5(multilingual=False):
    """A tokenizer that knows letters, and a text encoder of T5's kind, of width 32."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    letters = [(chr(number), -3.0) for number in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=32)
    kind, config = (UMT5EncoderModel, UMT5Config) if multilingual else (T5EncoderModel, T5Config)
    options = dict(d_model=_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, randomise(kind(config(vocab_size=len(vocabulary), **options)))


# --- pipelines ------------------------------------------------------------------------------------


def _sd(folder, **unet):
    from diffusers import DDIMScheduler

    tokenizer, text_encoder = _clip(folder)
    return dict(
        vae=tiny_vae(),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=tiny_unet(**unet),
        scheduler=DDIMScheduler(**_SCHEDULE, clip_sample=False),
    )


def _v1(folder, **unet):
    without = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return {**_sd(folder, **unet), **without}


def _control(folder):
    return dict(**_v1(folder), controlnet=tiny_controlnet())


def _sdxl(folder):
    parts = _sd(
        folder,
        cross_attention_dim=2 * _CLIP_WIDTH,
        # As in SDXL itself, the finest level has no attention.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=_CLIP_WIDTH + 6 * 8,
    )
    tokenizer, text_encoder = _clip(folder, "tokenizer_2", projection=True)
    return dict(**parts, tokenizer_2=tokenizer, text_encoder_2=text_encoder)


def _transformer(title, **changes):
    """One of tiny_transformers.py, changed."""
    import diffusers

    family = TRANSFORMERS[title]
    options = {**family.options, **changes}
    return randomise(getattr(diffusers, family.class_name)(**options))


def _flow(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _sd3(folder):
    transformer = _transformer(
        "Stable Diffusion 3",
        sample_size=8,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=2 * _CLIP_WIDTH,
    )
    parts = dict(transformer=transformer, vae=tiny_vae(shift_factor=0.1), scheduler=_flow())
    texts = [_clip(folder, "tokenizer", True), _clip(folder, "tokenizer_2", True), _t5()]
    for ending, (tokenizer, text_encoder) in zip(("", "_2", "_3"), texts):
        parts[f"tokenizer{ending}"] = tokenizer
        parts[f"text_encoder{ending}"] = text_encoder
    return parts


def _flux(folder):
    tokenizer, text_encoder = _clip(folder)
    tokenizer_2, text_encoder_2 = _t5()
    return dict(
        transformer=_transformer(
            "Flux.1",
            in_channels=16,  # four latents of four channels
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_CLIP_WIDTH,
        ),
        vae=tiny_vae(shift_factor=0.1),
        scheduler=_flow(use_dynamic_shifting=True),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
    )


def _pixart(folder):
    from diffusers import DPMSolverMultistepScheduler

    tokenizer, text_encoder = _t5()
    # Its pipeline generates at sizes that it knows, of 256 pixels here, and resizes the image.
    return dict(
        transformer=_transformer("PixArt-alpha, PixArt-sigma", sample_size=32, caption_channels=32),
        vae=tiny_vae(),
        scheduler=DPMSolverMultistepScheduler(),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
    )


def _wan(folder):
    from diffusers import AutoencoderKLWan

    tokenizer, text_encoder = _t5(multilingual=True)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return dict(
        transformer=_transformer("Wan 2.1, 2.2 (video)", text_dim=_WIDTH),
        vae=randomise(vae),
        scheduler=_flow(shift=3.0),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
    )


def _wan22(folder):
    """One network for the first half of a run, another for the second."""
    second = _transformer("Wan 2.1, 2.2 (video)", text_dim=_WIDTH, num_layers=1)
    return dict(**_wan(folder), transformer_2=second, boundary_ratio=0.8)


_KINDS = {
    "sd": ("StableDiffusionPipeline", _v1),
    "img2img": ("StableDiffusionImg2ImgPipeline", _v1),
    "inpaint": ("StableDiffusionInpaintPipeline", lambda folder: _v1(folder, in_channels=9)),
    "controlnet": ("StableDiffusionControlNetPipeline", _control),
    "sdxl": ("StableDiffusionXLPipeline", _sdxl),
    "sd3": ("StableDiffusion3Pipeline", _sd3),
    "flux": ("FluxPipeline", _flux),
    "pixart": ("PixArtSigmaPipeline", _pixart),
    "wan": ("WanPipeline", _wan),
    "wan22": ("WanPipeline", _wan22),
}
NAMES = tuple(_KINDS)
