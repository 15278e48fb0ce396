# MMagic's Stable Diffusion v1.5 with half of the tokens merged.
_base_ = "mmagic::stable_diffusion/stable-diffusion_ddim_denoisingunet.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)

# Weights of $SD_WEIGHTS, a folder in diffusers layout or a name on the model hub: the name in MMagic's
# own config has left it.
weights = "{{$SD_WEIGHTS:stable-diffusion-v1-5/stable-diffusion-v1-5}}"
model = dict(
    unet=dict(from_pretrained=weights),
    vae=dict(from_pretrained=weights),
    text_encoder=dict(pretrained_model_name_or_path=weights),
    tokenizer=weights,
)
