# MMagic's config with weights that exist: those of $SD_WEIGHTS, a folder in diffusers layout or a name on
# the model hub. The name in MMagic's own config has left it.
_base_ = "mmagic::dreambooth/dreambooth.py"

weights = "{{$SD_WEIGHTS:stable-diffusion-v1-5/stable-diffusion-v1-5}}"
model = dict(
    unet=dict(from_pretrained=weights),
    vae=dict(from_pretrained=weights),
    text_encoder=dict(pretrained_model_name_or_path=weights),
    tokenizer=weights,
    scheduler=dict(from_pretrained=weights),
    test_scheduler=dict(from_pretrained=weights),
)
