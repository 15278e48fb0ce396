# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Diffusion transformers small enough for tests, with random weights everywhere.

``TRANSFORMERS`` is what the tests of all of them go through, and what docs/support.md lists.
"""

from dataclasses import dataclass

import torch
from tiny import randomise

TEXT = 7  # tokens
_WIDTH = 12  # of the text
_HEADS = dict(num_attention_heads=2, attention_head_dim=8)
_PATCHES = dict(
    **_HEADS,
    in_channels=4,
    num_layers=2,
    sample_size=16,
    patch_size=2,
    norm_elementwise_affine=False,
)


@dataclass(frozen=True)
class Family:
    """A row of the table: what users call it, the class, and how it can be compiled."""

    title: str
    class_name: str
    options: dict
    compiles: str = "the whole network"
    frames: int = 1
    square: bool = False  # whether diffusers runs it on square grids only

    @property
    def grids(self):
        """Odd ones that it is tested on, (height, width) in tokens of a frame."""
        return ((9, 9), (5, 5)) if self.square else ((9, 7), (3, 20), (8, 8))

    def build(self, seed=0):
        """The network, in eval mode."""
        import diffusers

        torch.manual_seed(seed)
        return randomise(getattr(diffusers, self.class_name)(**self.options), seed)

    def tokens(self, grid=(8, 8)):
        """How many there are."""
        return self.frames * grid[0] * grid[1]

    def inputs(self, grid=(8, 8), batch=2, seed=0, time=None):
        """Keyword arguments of a call, for frames of so many tokens (height, width)."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape):
            return torch.randn(*shape, generator=generator)

        height, width = grid
        steps = 500 if time is None else time
        inputs = dict(timestep=torch.full((batch,), steps))
        if self.class_name == "FluxTransformer2DModel":
            inputs.update(
                hidden_states=noise(batch, height * width, 4),
                timestep=torch.full((batch,), steps / 1000),
                img_ids=image_ids(height, width),
                txt_ids=torch.zeros(TEXT, 3),
            )
        elif self.class_name == "WanTransformer3DModel":
            inputs.update(hidden_states=noise(batch, 4, self.frames, 2 * height, 2 * width))
        elif self.class_name == "CogVideoXTransformer3DModel":
            angle = noise(self.tokens(grid), 8)
            inputs.update(
                hidden_states=noise(batch, self.frames, 4, 2 * height, 2 * width),
                image_rotary_emb=(angle.cos(), angle.sin()),
            )
        else:
            inputs.update(hidden_states=noise(batch, 4, 2 * height, 2 * width))
        if self.class_name == "DiTTransformer2DModel":
            inputs["class_labels"] = torch.arange(batch) % 3
        else:
            inputs["encoder_hidden_states"] = noise(batch, TEXT, _WIDTH)
        if self.class_name in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
            inputs["pooled_projections"] = noise(batch, _WIDTH)
        if "PixArt" in self.title:
            inputs["added_cond_kwargs"] = dict(resolution=None, aspect_ratio=None)
            mask = torch.ones(batch, TEXT)
            mask[0, -2:] = 0
            inputs["encoder_attention_mask"] = mask
        return inputs


def image_ids(height, width):
    """(height * width, 3) position ids as Flux' pipeline makes them."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.view(-1, 3)


_PIXART = dict(
    **_PATCHES,
    out_channels=8,
    cross_attention_dim=16,
    caption_channels=_WIDTH,
    use_additional_conditions=False,
)
_SD3 = dict(
    **_HEADS,
    sample_size=32,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    joint_attention_dim=_WIDTH,
    caption_projection_dim=16,
    pooled_projection_dim=_WIDTH,
    pos_embed_max_size=32,
)
_FLUX = dict(
    **_HEADS,
    patch_size=1,
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=_WIDTH,
    pooled_projection_dim=_WIDTH,
    axes_dims_rope=(2, 2, 4),
)
_WAN = dict(
    **_HEADS,
    in_channels=4,
    out_channels=4,
    text_dim=_WIDTH,
    freq_dim=8,
    ffn_dim=32,
    num_layers=2,
)
_COGVIDEOX = dict(
    **_HEADS,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=_WIDTH,
    num_layers=2,
    max_text_seq_length=TEXT,
    use_rotary_positional_embeddings=True,
)

TRANSFORMERS = {
    family.title: family
    for family in (
        Family(
            "DiT", "DiTTransformer2DModel", dict(**_PATCHES, num_embeds_ada_norm=10), square=True
        ),
        Family("PixArt-alpha, PixArt-sigma", "PixArtTransformer2DModel", _PIXART),
        Family(
            "PixArt, older checkpoints",
            "Transformer2DModel",
            dict(**_PIXART, norm_type="ada_norm_single", num_embeds_ada_norm=1000),
        ),
        Family("Stable Diffusion 3", "SD3Transformer2DModel", _SD3),
        Family(
            "Stable Diffusion 3.5",
            "SD3Transformer2DModel",
            dict(**_SD3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        ),
        Family("Flux.1", "FluxTransformer2DModel", _FLUX, compiles="its blocks"),
        Family("Wan 2.1, 2.2 (video)", "WanTransformer3DModel", _WAN, frames=2),
        Family("CogVideoX (video)", "CogVideoXTransformer3DModel", _COGVIDEOX, frames=2),
    )
}
