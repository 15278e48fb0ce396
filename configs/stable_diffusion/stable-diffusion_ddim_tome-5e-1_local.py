# The same from a folder in diffusers layout (unet/, vae/, text_encoder/,
# tokenizer/), or from another name on a model hub:
#   SD_WEIGHTS=/models/stable-diffusion-v1-5 python tools/infer.py CONFIG
_base_ = "./stable-diffusion_ddim_tome-5e-1.py"

weights = "{{$SD_WEIGHTS:stable-diffusion-v1-5/stable-diffusion-v1-5}}"

model = dict(
    unet=dict(from_pretrained=weights),
    vae=dict(from_pretrained=weights),
    text_encoder=dict(pretrained_model_name_or_path=weights),
    tokenizer=weights,
)
