# The published table of tomesd (arXiv 2303.17604, table 2), with this package, tomesd itself
# and fewer steps side by side. README.md in this folder says what it needs and how it is run:
#   IMAGENET_VAL=DIR python tools/evaluate.py configs/benchmarks/tomesd_table.py --dry-run
_base_ = []

import os  # noqa: E402

from torchvision.models._meta import _IMAGENET_CATEGORIES as classes  # noqa: E402

default_scope = "mmagic"
custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)

# A folder in diffusers layout, or a name on a model hub.
weights = os.environ.get("SD_WEIGHTS", "stable-diffusion-v1-5/stable-diffusion-v1-5")
# PLMS, as in the paper: PNDM without its Runge-Kutta steps.
scheduler = dict(
    type="PNDMScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    skip_prk_steps=True,
    set_alpha_to_one=False,
    steps_offset=1,
)

model = dict(
    type="StableDiffusion",
    unet=dict(type="UNet2DConditionModel", from_pretrained=weights, subfolder="unet"),
    vae=dict(type="AutoencoderKL", from_pretrained=weights, subfolder="vae"),
    text_encoder=dict(
        type="ClipWrapper",
        clip_type="huggingface",
        pretrained_model_name_or_path=weights,
        subfolder="text_encoder",
    ),
    tokenizer=weights,
    scheduler=scheduler,
    test_scheduler=scheduler,
    enable_xformers=False,
)

ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
evaluation = dict(
    # Two images of each of the 1000 classes.
    prompts=[f"A high quality photograph of a {name}." for name in classes for _ in range(2)],
    # The first five images of every class of the validation set.
    real=os.environ.get("IMAGENET_VAL", "../../data/imagenet/val"),
    size=512,
    steps=50,
    guidance=7.5,
    dtype="fp16",
    batch_size=8,
    methods=[
        *[dict(name=f"ToMe {r:g}", tome_cfg=dict(ratio=r)) for r in ratios],
        *[dict(name=f"tomesd {r:g}", tomesd=dict(ratio=r)) for r in ratios],
    ],
    fewer_steps=[0.8, 0.65, 0.5],
    metrics=["fid", "psnr", "ssim", "ms_ssim", "lpips", "latent_error"],
    rounds=15,
)
del os, classes
