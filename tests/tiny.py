# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Models small enough for tests, made on the fly, MMagic configs of them, and calls of a UNet.

Weights are random everywhere: behind a layer that starts at zero, as the last convolution of
MMagic's ``DenoisingUnet`` does, a test would compare zeros with zeros. Everything comes from one
folder in diffusers layout, :func:`tiny_sd_folder`, by the ordinary ``from_pretrained``.
"""

import copy
import functools
import json
from pathlib import Path

import torch

# What a call of ``infer`` needs to be quick: 8x8 latents, that is 64 tokens.
QUICK = {"num_inference_steps": 2, "height": 64, "width": 64, "show_progress": False}

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_WIDTH = 16  # of the text encoder
_SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)
# Arguments of SDXL's UNet besides: the finest level has no attention.
XL_UNET = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=_WIDTH + 6 * 8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)


def randomise(module, seed=0):
    """Give every parameter a random value, of a size that keeps activations in range; returns the
    module, in eval mode. The global generator is untouched."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise /= parameter[0].numel() ** 0.5
            elif name.endswith("weight"):  # a norm
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.2
            parameter.copy_(noise)
    return module.eval()


# --- a UNet and its calls -------------------------------------------------------------------------


def tiny_unet(levels=2, seed=0, **changes):
    """A ``UNet2DConditionModel`` with attention on every level: its arguments are those of
    :func:`tiny_unet_config` with ``changes``. It takes (B, 4, h, w) and text (B, L, 16)."""
    if not changes:
        return copy.deepcopy(_unet(levels, seed))
    from diffusers import UNet2DConditionModel

    return randomise(UNet2DConditionModel(**{**tiny_unet_config(levels), **changes}), seed)


@functools.cache
def _unet(levels, seed):
    return tiny_unet(levels, seed, sample_size=16)


def tiny_unet_config(levels=2):
    """Arguments of :func:`tiny_unet`, as a dict."""
    return dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32, 32)[:levels],
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=_WIDTH,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
    )


def tiny_inputs(batch=2, size=16, seed=0, width=_WIDTH):
    """Keyword arguments for a call of :func:`tiny_unet`. ``size``: of the latent, one number or
    (height, width); ``width``: of the text."""
    generator = torch.Generator().manual_seed(seed)
    size = (size, size) if isinstance(size, int) else size
    return dict(
        sample=torch.randn(batch, 4, *size, generator=generator),
        timestep=torch.tensor(500),
        encoder_hidden_states=torch.randn(batch, 7, width, generator=generator),
    )


@torch.no_grad()
def run(network, **changes):
    """What a network returns for :func:`tiny_inputs`, with changes of these."""
    return network(**{**tiny_inputs(), **changes}).sample


def error(a, b):
    """Root mean square of a - b, relative to that of b."""
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def hooks_of(module):
    """All hooks in a module."""
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    return [hook for pair in tables for table in pair for hook in table.values()]


def tiny_vae_config(levels=4):
    """Arguments of an ``AutoencoderKL`` with a factor of 2 ** (levels - 1)."""
    return dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=[8] * levels,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=1,
        sample_size=64,
    )


def tiny_clip_config(vocabulary):
    """Arguments of a ``CLIPTextConfig``: 16 tokens of width 16."""
    return dict(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=_WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


# --- folders --------------------------------------------------------------------------------------


def tiny_sd_folder(folder, vocabulary=1024, levels=2):
    """Write a random Stable Diffusion in diffusers layout; returns the folder.

    Sub-folders ``unet``, ``vae`` (factor 8), ``text_encoder``, ``text_encoder_2`` (with
    projection), ``tokenizer``, ``tokenizer_2``, ``scheduler`` and ``clip`` (for FastComposer).
    ViCo needs CLIP's vocabulary of 49408.
    """
    import diffusers
    import transformers

    folder = Path(folder)
    for name in ("tokenizer", "tokenizer_2"):
        _write_tokenizer(folder / name, vocabulary)
    tiny_unet(levels).save_pretrained(folder / "unet")
    randomise(diffusers.AutoencoderKL(**tiny_vae_config())).save_pretrained(folder / "vae")
    text = tiny_clip_config(vocabulary)
    config = transformers.CLIPTextConfig(**text)
    for name, kind in (
        ("text_encoder", transformers.CLIPTextModel),
        ("text_encoder_2", transformers.CLIPTextModelWithProjection),
    ):
        randomise(kind(config)).save_pretrained(folder / name)
    vision = dict(
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=_WIDTH)
    randomise(transformers.CLIPModel(clip)).save_pretrained(folder / "clip")
    scheduler = diffusers.DDIMScheduler(**_SCHEDULE, clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    return str(folder)


def _write_tokenizer(folder, vocabulary):
    """A tokenizer in CLIP's layout that knows single letters, "cat" and "dog"."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    # The two special tokens come last, as in CLIP: ViCo counts on number 49407.
    tokens += [f"filler{i}</w>" for i in range(vocabulary - 2 - len(tokens))] + [_BOS, _EOS]
    special = dict(bos_token=_BOS, eos_token=_EOS, unk_token=_EOS, pad_token=_EOS)
    files = {
        "vocab.json": {token: i for i, token in enumerate(tokens)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "model_max_length": 16,
            "tokenizer_class": "CLIPTokenizer",
            "do_lower_case": True,
            **special,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- MMagic ---------------------------------------------------------------------------------------

# MMagic's own UNet (unet_type='stable').
NATIVE_UNET = dict(
    type="DenoisingUnet",
    image_size=64,
    base_channels=32,
    channels_cfg=[1, 2],
    unet_type="stable",
    act_cfg=dict(type="silu"),
    cross_attention_dim=_WIDTH,
    num_heads=2,
    in_channels=4,
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    output_cfg=dict(var="fixed"),
)

NATIVE_VAE = dict(type="EditAutoencoderKL", act_fn="silu", **tiny_vae_config())


def tiny_config(kind="StableDiffusion", folder="", **changes):
    """The ``model=`` of a MMagic config, new at every call.

    Args:
        kind (str): a class of MMagic's Stable Diffusion family, ``'StableDiffusion'`` with a
            diffusers UNet; or ``'native'`` for ``StableDiffusion`` with the networks that
            MMagic has of its own (weights: :func:`tiny_model` makes them random). Only the
            latter can be pickled: MMagic's wrappers of diffusers' classes cannot.
        folder (str): what :func:`tiny_sd_folder` wrote.
        **changes: keys to add or replace; None removes one.
    """
    folder = str(folder)
    options = dict(variance_type="learned_range", set_alpha_to_one=False, clip_sample=False)
    scheduler = dict(type="EditDDIMScheduler", **_SCHEDULE, **options)
    config = dict(
        type=kind,
        unet=dict(type="UNet2DConditionModel", from_pretrained=folder, subfolder="unet"),
        vae=dict(type="AutoencoderKL", from_pretrained=folder, subfolder="vae"),
        text_encoder=_text_encoder(folder, "text_encoder"),
        tokenizer=folder,
        scheduler=scheduler,
        test_scheduler=dict(scheduler),
        enable_xformers=False,
    )
    config.update(_changes_of_kinds(folder).get(kind, {}))
    config.update(changes)
    return {key: value for key, value in config.items() if value is not None}


def tiny_model(kind="StableDiffusion", folder="", **changes):
    """Build :func:`tiny_config` with MMagic's registry, with random weights everywhere."""
    from mmagic.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmagic")  # as MMagic's init_model does
    model = MODELS.build(tiny_config(kind, folder, **changes))
    return randomise(model)


def _text_encoder(folder, subfolder):
    return dict(
        type="ClipWrapper",
        clip_type="huggingface",
        pretrained_model_name_or_path=folder,
        subfolder=subfolder,
    )


def _changes_of_kinds(folder):
    """Class of MMagic's family -> what its config has besides or in place of Stable Diffusion's."""
    unet = dict(type="UNet2DConditionModel", **tiny_unet_config())
    controlnet = dict(type="ControlNetModel", conditioning_embedding_out_channels=(8, 8, 16, 16))
    without = ("sample_size", "out_channels", "up_block_types")
    controlnet |= {k: value for k, value in tiny_unet_config().items() if k not in without}
    ddim = dict(type="DDIMScheduler", clip_sample=False, **_SCHEDULE)
    with_ddim = dict(scheduler=ddim, test_scheduler=dict(ddim))
    pretrained = dict(
        finetuned_model_path="",
        enable_xformers_memory_efficient_attention=None,
        pretrained_model_name_or_path=folder,
        image_encoder=f"{folder}/clip",
        revision=None,
        non_ema_revision=None,
        object_localization=None,
        object_localization_weight=0.01,
        localization_layers=5,
        mask_loss=None,
        mask_loss_prob=0.5,
        object_localization_threshold=1.0,
        object_localization_normalize=None,
        no_object_augmentation=True,
        object_resolution=32,
    )
    blocks_3d = dict(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    motion = dict(
        type="UNet3DConditionMotionModel",
        **{**tiny_unet_config(), "sample_size": 8, "block_out_channels": (32, 32), **blocks_3d},
        use_inflated_groupnorm=True,
        unet_use_cross_frame_attention=False,
        unet_use_temporal_attention=False,
        use_motion_module=True,
        motion_module_resolutions=[1, 2],
        motion_module_mid_block=True,
        motion_module_decoder_only=False,
        motion_module_type="Vanilla",
        motion_module_kwargs=dict(
            num_attention_heads=2,
            num_transformer_block=1,
            attention_block_types=["Temporal_Self", "Temporal_Self"],
            temporal_position_encoding=True,
            temporal_position_encoding_max_len=32,
            temporal_attention_dim_div=1,
        ),
    )
    return {
        "native": dict(type="StableDiffusion", unet=dict(NATIVE_UNET), vae=dict(NATIVE_VAE)),
        "StableDiffusionInpaint": dict(unet={**unet, "in_channels": 9}),
        "ControlStableDiffusion": dict(controlnet=controlnet),
        "StableDiffusionXL": dict(
            text_encoder=None,
            tokenizer=None,
            text_encoder_one=_text_encoder(folder, "text_encoder"),
            tokenizer_one=folder,
            text_encoder_two=_text_encoder(folder, "text_encoder_2"),
            tokenizer_two=folder,
            unet={**unet, "cross_attention_dim": 2 * _WIDTH, **XL_UNET},
        ),
        "DreamBooth": dict(dtype="fp32"),
        "TextualInversion": dict(placeholder_token="<x>", initialize_token="cat"),
        "ViCo": dict(
            dtype="fp32",
            data_preprocessor=dict(type="DataPreprocessor", data_keys=None),
            # Of the transformers in tiny_unet(levels=2): 2 down, 1 in the middle, 4 up.
            image_cross_layers=[int(i % 2) for i in range(7)],
            placeholder="S*",
            initialize_token="dog",
            **with_ddim,
        ),
        "FastComposer": dict(dtype="fp32", pretrained_cfg=pretrained, **with_ddim),
        "AnimateDiff": dict(unet=motion, enable_xformers=None, **with_ddim),
    }


def write_config(path, model, **entries):
    """Write a MMagic config with plain values; return its path."""
    entries = {"default_scope": "mmagic", "model": model, **entries}
    entries["custom_imports"] = dict(imports=["mmagic_tome"], allow_failed_imports=False)
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in entries.items()) + "\n")
    return str(path)
