# MMagic's AnimateDiff with half of the tokens of every frame merged.
_base_ = "mmagic::animatediff/animatediff_ToonYou.py"

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
