# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pipelines of diffusers, small enough for tests, with random weights everywhere.

``PIPELINES`` is what the tests of all of them go through; docs/reference/support.md lists it. Those
around the networks of tiny_transformers.py have no text encoders and no decoder.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tiny import _SCHEDULE, XL_UNET, randomise, tiny_unet
from tiny_transformers import TEXT, TRANSFORMERS, WIDTH
from tiny_unets import kandinsky_unet, noise, tiny_controlnet, tiny_vae

STEPS = 2


def pipeline_of(class_name, **parts):
    """A pipeline. Components that it needs and that are not given are None."""
    import diffusers

    kind = getattr(diffusers, class_name)
    known = inspect.signature(kind.__init__).parameters
    options = {name: None for name, p in known.items() if p.default is p.empty and name != "self"}
    if "requires_safety_checker" in known:
        options["requires_safety_checker"] = False
    return kind(**{**options, **parts})


def sd_parts(scheduler="DDIMScheduler", vae=None, schedule=None, **unet):
    """Of Stable Diffusion's pipelines, without text encoders."""
    import diffusers

    clip = dict(clip_sample=False) if scheduler == "DDIMScheduler" else {}
    options = {**_SCHEDULE, **clip, "steps_offset": 1, **(schedule or {})}
    scheduler = getattr(diffusers, scheduler)(**options)
    return dict(vae=tiny_vae(**(vae or {})), unet=tiny_unet(**unet), scheduler=scheduler)


def xl_parts(time_ids=6, **changes):
    """The same of Stable Diffusion XL's pipelines."""
    options = dict(
        XL_UNET,
        scheduler="EulerDiscreteScheduler",
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        projection_class_embeddings_input_dim=WIDTH + time_ids * 8,
    )
    return sd_parts(**{**options, **changes})


def upscaler_parts():
    from diffusers import DDPMScheduler

    parts = sd_parts(
        vae=dict(levels=3, scaling_factor=0.08333),
        in_channels=7,
        num_class_embeds=1000,  # levels of noise on the small image
        only_cross_attention=True,
    )
    return dict(**parts, low_res_scheduler=DDPMScheduler())


def _gligen():
    """It embeds phrases with the text encoder itself."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = dict(hidden_size=WIDTH, intermediate_size=32, num_attention_heads=2)
    config = CLIPTextConfig(vocab_size=20, eos_token_id=19, num_hidden_layers=1, **sizes)
    text = dict(text_encoder=randomise(CLIPTextModel(config)), tokenizer=_Letters())
    return {**sd_parts(attention_type="gated"), **text}


class _Letters:
    """In place of a tokenizer: numbers of letters."""

    model_max_length = 16

    def __call__(self, texts, **options):
        from transformers import BatchEncoding

        ids = [[*(ord(letter) % 18 for letter in text[:8].ljust(8)), 19] for text in texts]
        return BatchEncoding(dict(input_ids=ids, attention_mask=ids), tensor_type="pt")


def _t2i_adapter():
    from diffusers import T2IAdapter

    adapter = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=8)
    return dict(**sd_parts(), adapter=randomise(adapter))


def _kandinsky():
    from diffusers import DDPMScheduler

    # The autoencoder is asked for its factor only.
    scheduler = DDPMScheduler(clip_sample=False)
    return dict(unet=kandinsky_unet(), scheduler=scheduler, movq=tiny_vae())


def _controlled(number=1):
    networks = [tiny_controlnet(seed) for seed in range(1, number + 1)]
    return dict(**sd_parts(), controlnet=networks if number > 1 else networks[0])


def _transformer_parts(title):
    from diffusers import FlowMatchEulerDiscreteScheduler

    # LTX-Video insists on it.
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting="LTX" in title)
    return dict(transformer=TRANSFORMERS[title].build(), scheduler=scheduler)


def _ip_adapter(pipeline):
    """Weights as a checkpoint has them, put in as diffusers' loader does."""
    from diffusers.models.embeddings import ImageProjection

    unet, weights = pipeline.unet, {}
    image = ImageProjection(WIDTH, WIDTH, num_image_text_embeds=4).state_dict()
    image = {name.replace("image_embeds", "proj"): x for name, x in image.items()}
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    for number, attention in enumerate(attentions):
        for kind in ("to_k", "to_v"):
            weight = torch.randn_like(getattr(attention, kind).weight) / 4
            weights[f"{2 * number + 1}.{kind}_ip.weight"] = weight
    unet._load_ip_adapter_weights([dict(image_proj=image, ip_adapter=weights)])
    assert any("IPAdapter" in type(p).__name__ for p in unet.attn_processors.values())


def _lora(pipeline, fused=False):
    from peft import LoraConfig

    torch.manual_seed(7)
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    # As large as the weights themselves they would drown what the image is made from.
    config = LoraConfig(r=2, lora_alpha=0.5, target_modules=names, init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    pipeline.unet.eval()
    if fused:
        pipeline.fuse_lora(components=["unet"])


def random_image(size=64):
    """(1, 3, h, w) between 0 and 1."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5))


def _mask(size):
    inside = (torch.arange(size) - size / 2).abs() < size / 4
    return (inside & inside[:, None])[None, None].float()


def _prompts(negative=TEXT):
    """Of a prompt, and of one with so many tokens."""
    prompt, other = noise(1, TEXT, WIDTH, seed=3), noise(1, negative, WIDTH, seed=4)
    return dict(prompt_embeds=prompt, negative_prompt_embeds=other)


def _masked(dtype=torch.float32):
    """Prompts with masks: the second has 4 tokens and padding."""
    mask = torch.ones(1, TEXT, dtype=dtype)
    other = mask * (torch.arange(TEXT) < 4)
    return dict(_prompts(), prompt_attention_mask=mask, negative_prompt_attention_mask=other)


_TEXT = _prompts()
_64, _128 = dict(height=64, width=64), dict(height=128, width=128)
_SIZED = dict(**_TEXT, **_64)
_IMAGE = dict(_TEXT, image=random_image())
_IMAGE_64 = dict(_IMAGE, **_64)
_IMAGES = dict(_SIZED, image=[random_image()] * 2)
_MASKED = dict(_IMAGE_64, mask_image=_mask(64))
_IP_EMBEDS = dict(_SIZED, ip_adapter_image_embeds=[torch.ones(2, 1, WIDTH)])
_PHRASES = dict(
    _SIZED,
    gligen_phrases=["a cat"],
    gligen_boxes=[[0.1, 0.2, 0.6, 0.7]],
    gligen_scheduled_sampling_beta=1.0,
)
_PROMPT = dict(prompt_embeds=_TEXT["prompt_embeds"])
_POOLED_PROMPT = dict(_PROMPT, pooled_prompt_embeds=noise(1, WIDTH, seed=5))
_POOLED = {**_POOLED_PROMPT, **_TEXT, "negative_pooled_prompt_embeds": noise(1, WIDTH, seed=6)}
_ONE_STEP = dict(_POOLED_PROMPT, **_128, guidance_scale=0.0, num_inference_steps=1)
_LATENT = noise(1, 4, 16, 16, seed=6)
_EMBEDS = noise(1, WIDTH, seed=8)
_IMAGE_PROMPT = dict(image_embeds=_EMBEDS, negative_image_embeds=-_EMBEDS, **_128)


@dataclass(frozen=True)
class Case:
    """A row of the table: what users call it, and how to build and call it.

    ``build`` returns the arguments of the class, given ``options``, and ``prepare`` is given the
    pipeline. ``tokens`` are those at the finest level with blocks, ``calls`` those of the network
    in one run.
    """

    title: str
    class_name: str
    call: dict
    options: dict = field(default_factory=dict)
    build: Callable = sd_parts
    prepare: Callable = lambda pipeline: None
    tokens: int = 64
    calls: int = STEPS

    def pipeline(self):
        """The pipeline, in eval mode and silent."""
        torch.manual_seed(0)
        pipeline = pipeline_of(self.class_name, **self.build(**self.options))
        pipeline.set_progress_bar_config(disable=True)
        self.prepare(pipeline)
        return pipeline

    def run(self, pipeline, **changes):
        """Latents of one run with a fixed seed, or what ``output_type`` says."""
        call = dict(num_inference_steps=STEPS, output_type="latent")
        call["generator"] = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipeline(**{**call, **self.call, **changes})[0])


def _around(title, class_name, call, tokens=48, calls=4, **more):
    """Around one of :data:`TRANSFORMERS`, at 4 steps: 8 calls where text and none are two calls."""
    call = {**call, **more, "height": 128, "width": 96, "num_inference_steps": 4}
    options = dict(title=title)
    return Case(title, class_name, call, options, _transformer_parts, tokens=tokens, calls=calls)


_SD, _XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
_CONTROL = "StableDiffusionControlNetPipeline"
_SD2 = dict(
    schedule=dict(prediction_type="v_prediction"),
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    upcast_attention=True,
)
_SDXL_TURBO = dict(
    scheduler="EulerAncestralDiscreteScheduler", schedule=dict(timestep_spacing="trailing")
)

_CASES = (
    Case("Stable Diffusion 1.x", _SD, _SIZED),
    Case("Stable Diffusion 2.x", _SD, _SIZED, _SD2),
    Case("SD-Turbo (no guidance)", _SD, dict(_SIZED, guidance_scale=0.0)),
    Case("image to image", "StableDiffusionImg2ImgPipeline", dict(_IMAGE, strength=1.0)),
    Case("inpainting, 9 channels", "StableDiffusionInpaintPipeline", _MASKED, dict(in_channels=9)),
    Case("InstructPix2Pix", "StableDiffusionInstructPix2PixPipeline", _IMAGE, dict(in_channels=8)),
    Case(
        "upscaler x4",
        "StableDiffusionUpscalePipeline",
        dict(_TEXT, image=random_image(size=16)),
        build=upscaler_parts,
        tokens=256,
    ),
    Case("ControlNet", _CONTROL, _IMAGE_64, build=_controlled),
    Case("several ControlNets", _CONTROL, _IMAGES, dict(number=2), _controlled),
    Case("T2I-Adapter", "StableDiffusionAdapterPipeline", _IMAGE_64, build=_t2i_adapter),
    Case("IP-Adapter", _SD, _IP_EMBEDS, prepare=_ip_adapter),
    Case("GLIGEN", "StableDiffusionGLIGENPipeline", _PHRASES, build=_gligen),
    Case("FreeU", _SD, _SIZED, prepare=lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    Case("LoRA", _SD, _SIZED, prepare=_lora),
    Case("LoRA, fused", _SD, _SIZED, prepare=lambda p: _lora(p, fused=True)),
    Case("Kandinsky 2.2", "KandinskyV22Pipeline", _IMAGE_PROMPT, build=_kandinsky),
    Case("SDXL base", _XL, dict(_POOLED, **_128), build=xl_parts),
    Case("SDXL-Turbo (no guidance, one step)", _XL, _ONE_STEP, _SDXL_TURBO, xl_parts, calls=1),
    Case(
        "SDXL refiner",
        "StableDiffusionXLImg2ImgPipeline",
        dict(_POOLED, image=_LATENT, denoising_start=0.6, num_inference_steps=5),
        build=lambda: dict(xl_parts(time_ids=5), requires_aesthetics_score=True),
    ),
    Case(
        "SDXL inpainting",
        "StableDiffusionXLInpaintPipeline",
        dict(_POOLED, image=random_image(size=128), mask_image=_mask(128), strength=1.0),
        dict(in_channels=9),
        xl_parts,
    ),
    _around("Stable Diffusion 3", "StableDiffusion3Pipeline", _POOLED),
    _around("Flux.1", "FluxPipeline", _POOLED_PROMPT),
    _around("AuraFlow", "AuraFlowPipeline", _masked()),
    _around("CogView 4", "CogView4Pipeline", _prompts(5), calls=8),
    _around("Flux.2", "Flux2Pipeline", _PROMPT),
    _around("Chroma", "ChromaPipeline", _masked(), calls=8),
    _around(
        "Qwen-Image",
        "QwenImagePipeline",
        _prompts(5),
        prompt_embeds_mask=torch.ones(1, TEXT, dtype=torch.int64),
        negative_prompt_embeds_mask=torch.ones(1, 5, dtype=torch.int64),
        true_cfg_scale=3.0,
        calls=8,
    ),
    _around("Z-Image", "ZImagePipeline", {k: [v[0]] for k, v in _prompts(5).items()}),
    _around("Lumina 2", "Lumina2Pipeline", _masked(torch.int64), calls=8),
    _around("Wan 2.1, 2.2 (video)", "WanPipeline", _TEXT, num_frames=5, tokens=96, calls=8),
    _around("LTX-Video (video)", "LTXPipeline", _masked(), num_frames=9, tokens=24),
    _around(
        "HunyuanVideo (video)",
        "HunyuanVideoPipeline",
        _POOLED_PROMPT,
        prompt_attention_mask=torch.ones(1, TEXT),
        num_frames=5,
        tokens=96,
    ),
)
PIPELINES = {case.title: case for case in _CASES}
