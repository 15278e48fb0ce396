"""The networks of the demo diffusion transformer; smaller `width` and `layers` are for the tests.

A Stable Diffusion 3 in small: joint attention of image and text tokens (Esser et al., "Scaling
Rectified Flow Transformers", section 4), trained by flow matching. It shares the VAE of the demo
UNet and starts from that model's text encoder.
"""

from __future__ import annotations

import torch
from common import repair_torchvision
from models import build_text_encoder

repair_torchvision()
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # noqa: E402

WIDTH, LAYERS, HEAD_SIZE = 192, 7, 64
SMALL_TEXT_WIDTH = 64  # of the second text encoder
PROMPT_TOKENS = 20  # the longest training caption has 15
PATCH = 2
SHIFT = 3.0  # of the sampling times, as Stable Diffusion 3 has it


def build_transformer(
    width: int = WIDTH, layers: int = LAYERS, text_width: int = 256, sample_size: int = 64
) -> SD3Transformer2DModel:
    """An MMDiT on 4-channel latents, at its start the identity in every block (adaLN-Zero).

    `text_width` is that of both text encoders together, `sample_size` the latents per side at the
    default image size: 64, hence 1024 tokens.
    """
    model = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=min(HEAD_SIZE, width),
        num_attention_heads=max(1, width // HEAD_SIZE),
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=sample_size // PATCH,
        qk_norm="rms_norm",
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.zeros_(norm.linear.weight)
    torch.nn.init.zeros_(model.norm_out.linear.weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def build_text_encoders(vocab_size: int, eos_token_id: int, width: float = 1.0):
    """(the demo model's CLIP text encoder with a projection, a second one far smaller)."""
    first = CLIPTextModelWithProjection(
        build_text_encoder(vocab_size, width, eos_token_id=eos_token_id).config
    )
    torch.nn.init.eye_(first.text_projection.weight)
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            **{
                **first.config.to_dict(),
                "hidden_size": SMALL_TEXT_WIDTH,
                "intermediate_size": 2 * SMALL_TEXT_WIDTH,
                "projection_dim": SMALL_TEXT_WIDTH,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            }
        )
    )
    return first, second


def build_flow_scheduler(shift: float = SHIFT) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


def for_flow(vae: AutoencoderKL) -> AutoencoderKL:
    """The demo VAE with the shift (0) that pipelines of Stable Diffusion 3 add to latents."""
    vae.register_to_config(shift_factor=0.0)
    return vae


def encode_text(first, second, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) -> (token features (B, L, D), pooled (B, D)), as the pipeline has them.

    Token features come from the layer before the last one of each encoder, side by side.
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (first, second)]
    features = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    return features, torch.cat([o.text_embeds for o in outputs], dim=-1)


class TrainingAttention:
    """Joint attention with a bias for each key, written for many short sequences on a CPU.

    Below `ONE_MATRIX` tokens the scores are one matrix: on one core, in bf16 and with 89 tokens,
    that takes a third of the time of the fused kernel, forward and backward together.
    Gives what the processor of diffusers gives, plus `key_bias` (broadcast over (B, heads, Q, K)).
    """

    ONE_MATRIX = 600

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, key_bias=None
    ):
        n = hidden_states.shape[1]

        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        query = [heads(attn.to_q(hidden_states), attn.norm_q)]
        key = [heads(attn.to_k(hidden_states), attn.norm_k)]
        value = [heads(attn.to_v(hidden_states))]
        if encoder_hidden_states is not None:
            query.append(heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q))
            key.append(heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k))
            value.append(heads(attn.add_v_proj(encoder_hidden_states)))
        query, key, value = (torch.cat(x, dim=2) for x in (query, key, value))
        value = value.to(query.dtype)
        if key.shape[2] < self.ONE_MATRIX:
            scores = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
            if key_bias is not None:
                scores = scores + key_bias.to(scores.dtype)
            out = scores.softmax(-1).to(value.dtype) @ value
        else:
            if key_bias is not None:
                key_bias = key_bias.to(query.dtype)
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, key_bias)
        out = out.transpose(1, 2).flatten(2)
        image = attn.to_out[0](out[:, :n])
        if encoder_hidden_states is None:
            return image
        text = out[:, n:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)
