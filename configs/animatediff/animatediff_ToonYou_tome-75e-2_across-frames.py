# MMagic's AnimateDiff with three quarters of the tokens of a clip merged, within and across frames,
# around cross-attention and feed-forward. Matching costs as much as merging saves, so a merge plan
# is reused for ten steps.
_base_ = "mmagic::animatediff/animatediff_ToonYou.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.75, targets=["crossattn", "mlp"], across_frames=True, plan_interval=10)

# Weights of $SD_WEIGHTS, a folder in diffusers layout or a name on the model hub: the name in MMagic's
# own config has left it.
weights = "{{$SD_WEIGHTS:stable-diffusion-v1-5/stable-diffusion-v1-5}}"
model = dict(
    unet=dict(from_pretrained=weights),
    vae=dict(from_pretrained=weights),
    text_encoder=dict(pretrained_model_name_or_path=weights),
    tokenizer=weights,
)
