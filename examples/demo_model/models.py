"""The networks of the demo model; a smaller `width` gives the tests small ones."""

from __future__ import annotations

import torch
from common import repair_torchvision

repair_torchvision()
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

# MMagic's StableDiffusion.decode_latents divides by this number whatever the VAE's config says, so
# the demo VAE is rescaled until it is the right one (see `standardise_latents`).
SCALING_FACTOR = 0.18215
MAX_TOKENS = 24


def _scaled(channels, width: float, multiple: int = 16):
    return tuple(max(multiple, round(c * width / multiple) * multiple) for c in channels)


def build_vae(width: float = 1.0) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=_scaled((32, 48, 64), width),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=SCALING_FACTOR,
    )


def build_unet(width: float = 1.0, sample_size: int = 64) -> UNet2DConditionModel:
    channels = _scaled((48, 96, 192), width)
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=_scaled((192,), width, 64)[0],
        # In this class the argument is the number of heads (diffusers keeps the old name).
        attention_head_dim=(1, 2, 3),
        norm_num_groups=8 if width < 1 else 16,
    )


def build_text_encoder(vocab_size: int, width: float = 1.0, eos_token_id: int = 1) -> CLIPTextModel:
    hidden = _scaled((192,), width, 64)[0]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=2,
            num_attention_heads=hidden // 64,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=hidden,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def build_models(width: float = 1.0, vocab_size: int = 2000, sample_size: int = 64) -> dict:
    """Random weights: `width=0.5` gives the half-size variant that the tests use."""
    return {
        "vae": build_vae(width),
        "unet": build_unet(width, sample_size),
        "text_encoder": build_text_encoder(vocab_size, width),
        "scheduler": build_scheduler(),
    }


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Rescale the VAE in place so that `0.18215 * latents` has mean 0 and deviation 1 per channel.

    `mean` and `std` are those of the present latents. The 1x1 convolutions on both sides of the
    latents absorb the change; the reconstruction is the same. A channel that the VAE hardly uses
    is left as small as it is: blown up, it would be noise for the diffusion model to learn.
    """
    std = torch.where(std < 0.2 * std.max(), torch.ones_like(std), std)
    scale = std * SCALING_FACTOR  # z_new = (z - mean) / scale
    n = vae.config.latent_channels
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:n] /= scale[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mean) / scale
    quant.bias[n:] -= 2 * scale.log()  # the log variance
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= scale[None, :, None, None]


@torch.no_grad()
def initialise_colour_path(vae: AutoencoderKL) -> None:
    """Make a new VAE begin as `average 4x4 pixels` and `repeat them 4x4`, colours exact.

    A VAE this small, trained for minutes, else keeps brightness and warm-cold and forgets the
    third axis of colour. Twelve channels carry (x, -x, K, -K) for red, green and blue along the
    residual connections: K makes the group norms nearly constant, and silu(x) - silu(-x) = x.
    Everything stays trainable.
    """
    k = 3.0  # larger is more exact, and more easily upset by the first training steps
    n = 12
    values = range(0, n, 4)  # where red, green and blue lie

    def resnets(part):
        blocks = [*(part.down_blocks if hasattr(part, "down_blocks") else part.up_blocks)]
        for block in [part.mid_block, *blocks]:
            yield from block.resnets

    def keep(conv, taps):
        """Rows 0..n of `conv` pass their channel on, weighted by `taps` of the kernel."""
        conv.weight[:n] = 0
        conv.bias[:n] = 0
        for c in range(n):
            conv.weight[c, c] = taps

    for part in (vae.encoder, vae.decoder):
        for resnet in resnets(part):
            resnet.conv2.weight[:n] = 0
            resnet.conv2.bias[:n] = 0
            if resnet.conv_shortcut is not None:
                keep(resnet.conv_shortcut, torch.ones(1, 1))
    average = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])
    centre = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    for block in vae.encoder.down_blocks:
        for down in block.downsamplers or ():
            keep(down.conv, average)
    for block in vae.decoder.up_blocks:
        for up in block.upsamplers or ():
            keep(up.conv, centre)

    def spread(conv, inverse):
        """`conv` writes the twelve channels from colours that `inverse` computes of its input."""
        conv.weight[:n] = 0
        conv.bias[:n] = 0
        for c, row in zip(values, inverse):
            for channel, value in enumerate(row):
                conv.weight[c, channel, 1, 1] = value
                conv.weight[c + 1, channel, 1, 1] = -value
            conv.bias[c + 2], conv.bias[c + 3] = k, -k

    def collect(norm, conv, matrix):
        """Rows of `conv` become `matrix` times the colours; the norm's division is undone."""
        size = norm.num_channels // norm.num_groups
        for i, c in enumerate(values):
            group = range(c // size * size, (c // size + 1) * size)
            constants = sum(1 for g in group if g < n and g % 4 >= 2)
            norm.weight[c] = norm.weight[c + 1] = k * (constants / size) ** 0.5
            for row, line in enumerate(matrix):
                conv.weight[row, c] = centre * line[i]
                conv.weight[row, c + 1] = -centre * line[i]
                conv.bias[row] = 0

    # Brightness, warm-cold, green-magenta, each of a deviation of about 2.
    colours = torch.tensor([[1.5, 1.5, 1.5], [3.5, 0.0, -3.5], [-3.5, 7.0, -3.5]])
    spread(vae.encoder.conv_in, torch.eye(3))
    vae.encoder.conv_out.weight[:3] = 0
    collect(vae.encoder.conv_norm_out, vae.encoder.conv_out, colours)
    vae.encoder.conv_out.weight[4:] *= 0.1
    vae.encoder.conv_out.bias[4:] = -5.0  # the log variance
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight[:] = torch.eye(conv.weight.shape[0])[:, :, None, None]
        conv.bias[:] = 0
    spread(vae.decoder.conv_in, torch.linalg.inv(colours))
    vae.decoder.conv_out.weight[:] *= 0.1
    collect(vae.decoder.conv_norm_out, vae.decoder.conv_out, torch.eye(3))


@torch.no_grad()
def soften_upsampling(vae: AutoencoderKL, amount: float = 0.5) -> None:
    """Move the colour path of the decoder from repeating pixels towards interpolating them."""
    line = torch.tensor([0.25, 0.5, 0.25])
    change = amount * torch.outer(line, line)
    change[1, 1] -= amount
    for block in vae.decoder.up_blocks:
        for up in block.upsamplers or ():
            for c in range(12):
                up.conv.weight[c, c] += change
