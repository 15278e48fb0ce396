# Stable Diffusion v1.5 with MMagic's own networks in place of diffusers', half of the tokens merged.
# Their weights come from a checkpoint of MMagic's; without one they are random.
_base_ = "mmagic::stable_diffusion/stable-diffusion_ddim_denoisingunet.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)

# Text encoder of $SD_WEIGHTS, a folder in diffusers layout or a name on the model hub: the name in
# MMagic's own config has left it.
weights = "{{$SD_WEIGHTS:stable-diffusion-v1-5/stable-diffusion-v1-5}}"
model = dict(
    text_encoder=dict(pretrained_model_name_or_path=weights),
    tokenizer=weights,
    unet=dict(
        _delete_=True,
        type="DenoisingUnet",
        image_size=512,
        base_channels=320,
        channels_cfg=[1, 2, 4, 4],
        unet_type="stable",
        act_cfg=dict(type="silu"),
        cross_attention_dim=768,
        num_heads=8,
        in_channels=4,
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        output_cfg=dict(var="fixed"),
    ),
    vae=dict(
        _delete_=True,
        type="EditAutoencoderKL",
        act_fn="silu",
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        in_channels=3,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=32,
        out_channels=3,
        sample_size=512,
    ),
)
