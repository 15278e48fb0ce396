# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pipelines of diffusers around UNets, small enough for tests, with random weights everywhere.

``PIPELINES`` is what the tests of all of them go through, and what docs/support.md lists.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tiny import randomise, tiny_inputs, tiny_unet, tiny_unet_config

_TEXT, _WIDTH = 7, 16
_SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)
STEPS = 2
# Of UNets with one level; others want multiples of their factor.
GRIDS = ((33, 31), (17, 90), (8, 200))


@dataclass(frozen=True)
class Case:
    """A row of the table: what users call it, and how to build and call it.

    ``prepare`` is given the pipeline once it is built. ``tokens`` are those at the finest level
    with blocks, ``calls`` those of the UNet in one run.
    """

    title: str
    class_name: str
    build: Callable
    call: Callable
    prepare: Callable = lambda pipeline: None
    tokens: int = 64
    calls: int = STEPS
    options: dict = field(default_factory=dict)

    def pipeline(self):
        """The pipeline, in eval mode and silent."""
        import diffusers

        torch.manual_seed(0)
        pipeline = getattr(diffusers, self.class_name)(**self.build())
        pipeline.set_progress_bar_config(disable=True)
        self.prepare(pipeline)
        return pipeline

    def run(self, pipeline, **changes):
        """Latents of one run with a fixed seed, or what ``output_type`` says."""
        call = dict(
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        out = pipeline(**{**call, **self.call(pipeline), **changes}).images
        return out if isinstance(out, torch.Tensor) else torch.as_tensor(out)


# --- components -----------------------------------------------------------------------------------


def tiny_vae(levels=4, **changes):
    """An ``AutoencoderKL`` with a factor of 2 ** (levels - 1)."""
    from diffusers import AutoencoderKL

    return randomise(
        AutoencoderKL(
            **{
                **dict(
                    in_channels=3,
                    out_channels=3,
                    latent_channels=4,
                    block_out_channels=(8,) * levels,
                    norm_num_groups=8,
                    down_block_types=("DownEncoderBlock2D",) * levels,
                    up_block_types=("UpDecoderBlock2D",) * levels,
                    sample_size=64,
                ),
                **changes,
            }
        )
    )


def tiny_controlnet(seed=1):
    """A ``ControlNetModel`` that fits :func:`tiny.tiny_unet`; its outputs are not zero."""
    from diffusers import ControlNetModel

    config = tiny_unet_config(levels=2)
    for name in ("sample_size", "out_channels", "up_block_types"):
        del config[name]
    return randomise(
        ControlNetModel(**config, conditioning_embedding_out_channels=(8, 8, 16, 16)), seed
    )


def random_image(channels=3, size=64, batch=1):
    """(B, C, h, w) between 0 and 1."""
    noise = torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(5))
    return noise


def text(width=_WIDTH):
    """Embeddings of a prompt and of an empty one."""
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(2, 1, _TEXT, width, generator=generator)
    return dict(prompt_embeds=both[0], negative_prompt_embeds=both[1])


def _sd(scheduler="DDIMScheduler", vae=None, schedule=None, **unet):
    import diffusers

    options = {**_SCHEDULE, "steps_offset": 1, **(schedule or {})}
    if scheduler == "DDIMScheduler":
        options["clip_sample"] = False
    return dict(
        vae=tiny_vae(**(vae or {})),
        text_encoder=None,
        tokenizer=None,
        unet=tiny_unet(**unet),
        scheduler=getattr(diffusers, scheduler)(**options),
    )


def _v1(**changes):
    return dict(
        **_sd(**changes),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _xl(time_ids=6, **changes):
    schedule = changes.pop("schedule", None)
    scheduler = changes.pop("scheduler", "EulerDiscreteScheduler")
    return dict(
        **_sd(
            scheduler,
            schedule=schedule,
            **{
                **dict(
                    # As in SDXL itself, the finest level has no attention.
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    transformer_layers_per_block=(1, 2),
                    use_linear_projection=True,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=_WIDTH + time_ids * 8,
                ),
                **changes,
            },
        ),
        text_encoder_2=None,
        tokenizer_2=None,
        force_zeros_for_empty_prompt=False,
    )


def _xl_text():
    pooled = torch.randn(2, 1, _WIDTH, generator=torch.Generator().manual_seed(4))
    return dict(**text(), pooled_prompt_embeds=pooled[0], negative_pooled_prompt_embeds=pooled[1])


def _without_guidance():
    return {name: x for name, x in _xl_text().items() if "negative" not in name}


def _size(**more):
    return lambda pipeline: dict(**text(), height=64, width=64, **more)


def _mask():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    return mask


def _freeu(pipeline):
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def _ip_adapter(pipeline):
    """Weights as a checkpoint has them, put in as diffusers' loader does."""
    import diffusers

    unet, state = pipeline.unet, {}
    state["image_proj"] = diffusers.models.embeddings.ImageProjection(
        cross_attention_dim=_WIDTH, image_embed_dim=_WIDTH, num_image_text_embeds=4
    ).state_dict()
    names = {"image_embeds": "proj"}
    state["image_proj"] = {
        ".".join(names.get(part, part) for part in name.split(".")): x
        for name, x in state["image_proj"].items()
    }
    state["ip_adapter"] = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for kind in ("to_k", "to_v"):
                weight = torch.randn_like(getattr(attention, kind).weight) / 4
                state["ip_adapter"][f"{number}.{kind}_ip.weight"] = weight
            number += 2
    unet._load_ip_adapter_weights([state])
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


def _gligen():
    """It embeds phrases with the text encoder itself."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=19,
    )
    parts = _v1(attention_type="gated")
    return {**parts, "text_encoder": randomise(CLIPTextModel(config)), "tokenizer": _Letters()}


class _Letters:
    """Stands in for a tokenizer: numbers of letters."""

    model_max_length = 16

    def __call__(self, texts, **options):
        from transformers import BatchEncoding

        ids = [[*(ord(letter) % 18 for letter in text[:8]), 19] for text in texts]
        longest = max(map(len, ids))
        ids = [row + [19] * (longest - len(row)) for row in ids]
        return BatchEncoding(dict(input_ids=ids, attention_mask=ids), tensor_type="pt")


def _adapter():
    from diffusers import T2IAdapter

    adapter = T2IAdapter(
        in_channels=3,
        channels=[16, 32],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter",
    )
    return dict(**_v1(), adapter=randomise(adapter))


def _upscaler():
    from diffusers import DDPMScheduler

    parts = _sd(
        vae=dict(levels=3, scaling_factor=0.08333),
        in_channels=7,
        num_class_embeds=1000,  # levels of noise on the small image
        only_cross_attention=True,
    )
    return dict(**parts, low_res_scheduler=DDPMScheduler(), max_noise_level=350)


def kandinsky_unet():
    """Its attention works on the image itself; there are no transformer blocks."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,  # with the variance
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=_WIDTH,
        addition_embed_type="image",
        encoder_hid_dim=_WIDTH,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    return randomise(unet)


def kandinsky_inputs(batch=2, size=(16, 16)):
    """Keyword arguments for a call of :func:`kandinsky_unet`."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, _WIDTH, generator=generator)
    return dict(
        sample=torch.randn(batch, 4, *size, generator=generator),
        timestep=torch.tensor(500),
        encoder_hidden_states=None,
        added_cond_kwargs=dict(image_embeds=embeds),
    )


def video_unet():
    """Stable Video Diffusion's: its frames are merged one by one."""
    from diffusers import UNetSpatioTemporalConditionModel

    return randomise(
        UNetSpatioTemporalConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),  # its norms have 32 groups
            layers_per_block=1,
            num_attention_heads=(2, 4),
            cross_attention_dim=_WIDTH,
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        )
    )


def video_inputs(batch=2, size=(8, 8)):
    """Keyword arguments for a call of :func:`video_unet`, of three frames."""
    generator = torch.Generator().manual_seed(0)
    return dict(
        sample=torch.randn(batch, 3, 4, *size, generator=generator),
        timestep=torch.tensor(500),
        encoder_hidden_states=torch.randn(batch, 1, _WIDTH, generator=generator),
        added_time_ids=torch.randn(batch, 3, generator=generator),
    )


# Of a clip of AnimateDiff.
FRAMES = 3


def motion_unet():
    """diffusers' UNet of AnimateDiff; MMagic's is laid out in the same way."""
    from diffusers import UNetMotionModel

    return randomise(
        UNetMotionModel(
            sample_size=8,
            block_out_channels=(16, 16),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=_WIDTH,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        )
    )


def motion_inputs(clips=2, size=(8, 8)):
    """Keyword arguments for a call of :func:`motion_unet`."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(clips, 4, FRAMES, *size, generator=generator)
    text = torch.randn(clips, _TEXT, _WIDTH, generator=generator)
    return dict(
        sample=sample,
        timestep=torch.tensor(500),
        encoder_hidden_states=text.repeat_interleave(FRAMES, dim=0),  # as its pipeline does
    )


def controlnet_inputs():
    """Keyword arguments for a call of :func:`tiny_controlnet`."""
    return {**tiny_inputs(size=8), "controlnet_cond": random_image(batch=2)}


def _kandinsky():
    from diffusers import DDPMScheduler, VQModel

    movq = VQModel(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_type="spatial",
        num_vq_embeddings=12,
    )
    scheduler = DDPMScheduler(clip_sample=False)
    return dict(unet=kandinsky_unet(), scheduler=scheduler, movq=randomise(movq))


def _image_embeds():
    embeds = torch.randn(1, _WIDTH, generator=torch.Generator().manual_seed(8))
    return dict(image_embeds=embeds, negative_image_embeds=-embeds, height=128, width=128)


# --- the lists ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A kind of UNet: what users call it, the class, odd grids that it is tested on in tokens;
    ``layered`` builds one with several levels, where ``build`` does not."""

    title: str
    class_name: str
    build: Callable
    inputs: Callable
    grids: tuple
    compiles: str = "the whole network"
    layered: Callable | None = None


NETWORKS = {
    network.title: network
    for network in (
        Network(
            "Stable Diffusion 1, 2, XL and other UNets",
            "UNet2DConditionModel and alike",
            lambda: tiny_unet(levels=1),
            tiny_inputs,
            GRIDS,
            layered=tiny_unet,
        ),
        Network("ControlNet", "ControlNetModel", tiny_controlnet, controlnet_inputs, ((8, 8),)),
        Network(
            "Kandinsky 2.2: attention on the image itself",
            "UNet2DConditionModel with added keys",
            kandinsky_unet,
            kandinsky_inputs,
            ((7, 9), (3, 20), (8, 8)),
        ),
        Network(
            "Stable Video Diffusion",
            "UNetSpatioTemporalConditionModel",
            video_unet,
            video_inputs,
            ((6, 10), (8, 8)),
        ),
        Network(
            "AnimateDiff, frame by frame or across frames",
            "UNetMotionModel, MMagic's UNet3DConditionMotionModel",
            motion_unet,
            motion_inputs,
            ((6, 10), (8, 8)),
        ),
    )
}

_SD = "StableDiffusionPipeline"

PIPELINES = {
    case.title: case
    for case in (
        Case("Stable Diffusion 1.x", _SD, _v1, _size()),
        Case(
            "Stable Diffusion 2.x",
            _SD,
            lambda: _v1(
                schedule=dict(prediction_type="v_prediction"),
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                upcast_attention=True,
            ),
            _size(),
        ),
        Case("SD-Turbo (no guidance)", _SD, _v1, _size(guidance_scale=0.0)),
        Case(
            "image to image",
            "StableDiffusionImg2ImgPipeline",
            _v1,
            lambda pipeline: dict(**text(), image=random_image(), strength=1.0),
        ),
        Case(
            "inpainting, 9 channels",
            "StableDiffusionInpaintPipeline",
            lambda: _v1(in_channels=9),
            lambda pipeline: dict(
                **text(), image=random_image(), mask_image=_mask(), height=64, width=64
            ),
        ),
        Case(
            "InstructPix2Pix",
            "StableDiffusionInstructPix2PixPipeline",
            lambda: _v1(in_channels=8),
            lambda pipeline: dict(**text(), image=random_image()),
        ),
        Case(
            "upscaler x4",
            "StableDiffusionUpscalePipeline",
            _upscaler,
            lambda pipeline: dict(**text(), image=random_image(size=16)),
            tokens=256,
        ),
        Case(
            "ControlNet",
            "StableDiffusionControlNetPipeline",
            lambda: dict(**_v1(), controlnet=tiny_controlnet()),
            lambda pipeline: dict(**text(), image=random_image(), height=64, width=64),
        ),
        Case(
            "several ControlNets",
            "StableDiffusionControlNetPipeline",
            lambda: dict(**_v1(), controlnet=[tiny_controlnet(), tiny_controlnet(seed=2)]),
            lambda pipeline: dict(**text(), image=[random_image()] * 2, height=64, width=64),
        ),
        Case(
            "T2I-Adapter",
            "StableDiffusionAdapterPipeline",
            _adapter,
            lambda pipeline: dict(**text(), image=random_image(), height=64, width=64),
        ),
        Case(
            "IP-Adapter",
            _SD,
            _v1,
            lambda pipeline: dict(
                **_size()(pipeline), ip_adapter_image_embeds=[torch.ones(2, 1, _WIDTH)]
            ),
            prepare=_ip_adapter,
        ),
        Case(
            "GLIGEN",
            "StableDiffusionGLIGENPipeline",
            _gligen,
            lambda pipeline: dict(
                **_size()(pipeline),
                gligen_phrases=["a cat"],
                gligen_boxes=[[0.1, 0.2, 0.6, 0.7]],
                gligen_scheduled_sampling_beta=1.0,
            ),
        ),
        Case("FreeU", _SD, _v1, _size(), prepare=_freeu),
        Case("LoRA", _SD, _v1, _size(), prepare=_lora),
        Case("LoRA, fused", _SD, _v1, _size(), prepare=lambda p: _lora(p, fused=True)),
        Case("Kandinsky 2.2", "KandinskyV22Pipeline", _kandinsky, lambda pipeline: _image_embeds()),
        Case(
            "SDXL base",
            "StableDiffusionXLPipeline",
            _xl,
            lambda pipeline: dict(**_xl_text(), height=128, width=128),
        ),
        Case(
            "SDXL-Turbo (no guidance, one step)",
            "StableDiffusionXLPipeline",
            lambda: _xl(
                scheduler="EulerAncestralDiscreteScheduler",
                schedule=dict(timestep_spacing="trailing"),
            ),
            lambda pipeline: dict(
                **_without_guidance(),
                height=128,
                width=128,
                guidance_scale=0.0,
                num_inference_steps=1,
            ),
            calls=1,
        ),
        Case(
            "SDXL refiner",
            "StableDiffusionXLImg2ImgPipeline",
            lambda: dict(**_xl(time_ids=5), requires_aesthetics_score=True),
            lambda pipeline: dict(
                **_xl_text(),
                image=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(6)),
                denoising_start=0.6,
                num_inference_steps=5,
            ),
        ),
        Case(
            "SDXL inpainting",
            "StableDiffusionXLInpaintPipeline",
            lambda: _xl(in_channels=9),
            lambda pipeline: dict(
                **_xl_text(),
                image=random_image(size=128),
                mask_image=_mask().repeat_interleave(2, 2).repeat_interleave(2, 3),
                height=128,
                width=128,
                strength=1.0,
            ),
        ),
    )
}
