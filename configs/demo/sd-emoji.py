# The demo model without any acceleration: a small Stable Diffusion for images
# of emoji that comes with the package. An ordinary MMagic config, without
# `tome_cfg` and `cache_cfg`.

# Declaring a (here empty) base keeps this a text config for mmengine, which
# would otherwise take the import below for its lazy style.
_base_ = []

from mmagic_tome.assets import asset_path  # noqa: E402

default_scope = "mmagic"

# Where the weights are depends on how the package was installed.
weights = asset_path("demo_model")

model = dict(
    _scope_="mmagic",
    type="StableDiffusion",
    unet=dict(type="UNet2DConditionModel", from_pretrained=weights, subfolder="unet"),
    vae=dict(type="AutoencoderKL", from_pretrained=weights, subfolder="vae"),
    text_encoder=dict(
        type="ClipWrapper",
        clip_type="huggingface",
        pretrained_model_name_or_path=weights,
        subfolder="text_encoder",
        # The weights are stored in half precision, and transformers keeps what
        # is stored, unlike diffusers.
        torch_dtype="float32",
    ),
    tokenizer=weights,
    scheduler=dict(type="DDIMScheduler", from_pretrained=weights, subfolder="scheduler"),
    test_scheduler=dict(type="DDIMScheduler", from_pretrained=weights, subfolder="scheduler"),
    enable_xformers=False,
)

# What `tools/infer.py` generates by default.
infer_cfg = dict(
    prompts=["red apple", "smiling face with sunglasses", "sailboat"],
    steps=16,
    guidance=3.0,
)
