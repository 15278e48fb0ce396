# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Diffusion transformers small enough for tests, with random weights everywhere.

``TRANSFORMERS`` is what the tests of all of them go through; docs/reference/support.md lists it.
"""

import inspect
import re
from dataclasses import dataclass, field, replace

import torch
from tiny import randomise

TEXT = 7  # tokens
WIDTH = 16  # of the text, and of the networks
# Value -> options of that value, of all classes that have them.
_NUMBERS = {
    1: "num_refiner_layers n_refiner_layers approximator_layers num_kv_heads",
    2: "num_attention_heads n_heads n_kv_heads num_layers num_single_layers num_mmdit_layers "
    "num_single_dit_layers n_layers",
    4: "in_channels out_channels vace_in_channels condition_dim",
    5: "text_len_t5",
    TEXT: "text_len max_text_seq_length",
    8: "attention_head_dim time_embed_dim freq_dim multiple_of",
    WIDTH: "joint_attention_dim text_embed_dim text_dim caption_channels cap_feat_dim "
    "pooled_projection_dim hidden_size dim sample_size caption_projection_dim cross_attention_dim "
    "cross_attention_dim_t5 timestep_guidance_channels approximator_num_channels "
    "approximator_hidden_dim",
    32: "ffn_dim",
    256: "pos_embed_max_size",
}
_OFF = (
    "guidance_embeds norm_elementwise_affine use_additional_conditions learn_sigma is_train_face "
    "use_style_cond_and_image_meta_size"
)
_COMMON = {
    **{name: value for value, names in _NUMBERS.items() for name in names.split()},
    **dict.fromkeys(_OFF.split(), False),
    "use_rotary_positional_embeddings": True,
    "axes_dims_rope": (2, 2, 4),
    "rope_axes_dim": (2, 2, 4),
}


@dataclass(frozen=True)
class Family:
    """A row of the table: what users call it, the class, and how it can be compiled.

    Attributes:
        more: names in :data:`_INPUTS` of arguments of a call besides ``base`` and the timestep.
        own: options besides :data:`_COMMON`.
        latent: axes behind the batch: C channels, F frames, h and w, or N tokens.
        frames: of a video.
        square: whether diffusers runs it on square grids only.
        span: the timestep of pure noise as its pipelines pass it; negative: that of no noise,
            since it is counted in the opposite direction.
        kinds: kinds of target that its blocks have.
        beside: beginning of a block's name -> tokens besides the image's in its sequences.
            Default: the text's.
        joins_inside: beginning of the names of blocks whose attention joins text and image itself.
        depth: which option says how many blocks its longest list has.
        time_name: of the timestep in a call.
        rotary: whether positions are no part of the tokens.
    """

    title: str
    class_name: str
    more: str = ""
    own: dict = field(default_factory=dict)
    base: str = "hidden_states encoder_hidden_states"
    latent: str = "C h w"
    compiles: str = "the whole network"
    frames: int = 1
    square: bool = False
    span: float = 1000
    kinds: tuple = ("attn", "mlp")
    beside: dict = field(default_factory=dict)
    joins_inside: str = " "
    depth: str = "num_layers"
    time_name: str = "timestep"
    rotary: bool = False

    @property
    def grids(self):
        """Odd ones that it is tested on, (height, width) in tokens of a frame."""
        odd = ((9, 7), (3, 20), (8, 8), (17, 90))
        return ((9, 9), (5, 5), (33, 33)) if self.square else odd

    @property
    def inner(self):
        """Targets inside its blocks, to merge at together."""
        return [kind for kind in ("attn", "mlp") if kind in self.kinds]

    @property
    def options(self):
        """Of the class."""
        known = inspect.signature(self.kind.__init__).parameters
        return {**{name: _COMMON[name] for name in _COMMON if name in known}, **self.own}

    @property
    def kind(self):
        """The class."""
        import diffusers

        return getattr(diffusers, self.class_name)

    def build(self, seed=0):
        """The network, in eval mode."""
        torch.manual_seed(seed)
        return randomise(self.kind(**self.options), seed)

    def changed(self, **options):
        """The same with other options."""
        return replace(self, own={**self.own, **options})

    @property
    def lengths(self):
        """Option of the class -> how many blocks its list has."""
        names = r"(num|n)_(single_|mmdit_|single_dit_|refiner_)?layers"
        return {name: n for name, n in self.options.items() if re.fullmatch(names, name)}

    def deeper(self, blocks):
        """The same with so many blocks in its longest list."""
        return self.changed(**{self.depth: blocks})

    def tokens(self, grid=(8, 8)):
        """How many there are."""
        return self.frames * grid[0] * grid[1]

    def inputs(self, grid=(8, 8), batch=2, seed=0, time=500):
        """Keyword arguments of a call, for frames of so many tokens (height, width).

        ``time`` is of 1000 steps, 1000 being pure noise.
        """
        draw = Draw(self, grid, batch, seed)
        noise = time / 1000 * self.span if self.span > 0 else 1 - time / 1000
        call = {name: _INPUTS[name](draw) for name in (*self.base.split(), *self.more.split())}
        return {**call, self.time_name: torch.full((batch,), noise)}


class Draw:
    """Random inputs of a family for a grid and a batch."""

    def __init__(self, family, grid, batch, seed):
        self.height, self.width = grid
        self.family, self.batch, self.frames = family, batch, family.frames
        self.tokens = family.tokens(grid)
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape):
        return torch.randn(self.batch, *shape, generator=self.generator)

    def latent(self, axes=None):
        """Patches of 2x2 where there are rows and columns; see :class:`Family`."""
        sizes = dict(C=4, F=self.frames, h=2 * self.height, w=2 * self.width, N=self.tokens)
        return self.noise(*map(sizes.get, (axes or self.family.latent).split()))

    def mask(self, length=TEXT, dtype=torch.int64):
        """(B, L), with an end that is padding in the first entry."""
        mask = torch.ones(self.batch, length, dtype=dtype)
        mask[0, -2:] = 0
        return mask

    def rotary(self):
        """Cosines and sines (N, 8)."""
        angle = torch.randn(self.tokens, 8, generator=self.generator)
        return angle.cos(), angle.sin()

    def joint_mask(self):
        """(B, text + N)."""
        return torch.cat([self.mask(dtype=torch.float32), torch.ones(self.batch, self.tokens)], 1)

    def ids(self, height, width):
        """(height * width, axes) position ids."""
        return image_ids(height, width, len(self.family.options["axes_dims_rope"]))


def image_ids(height, width, axes=3):
    """(height * width, axes) position ids as Flux' pipelines make them."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.view(-1, axes)


# Argument of a call -> what is passed.
_INPUTS = {
    "hidden_states": Draw.latent,
    "control_hidden_states": Draw.latent,
    "encoder_hidden_states": lambda draw: draw.noise(TEXT, WIDTH),
    "encoder_attention_mask": Draw.mask,
    "encoder_hidden_states_mask": lambda draw: draw.mask(dtype=torch.bool),
    "encoder_hidden_states_t5": lambda draw: draw.noise(5, WIDTH),
    "text_embedding_mask": Draw.mask,
    "text_embedding_mask_t5": lambda draw: draw.mask(5),
    "pooled_projections": lambda draw: draw.noise(WIDTH),
    "attention_mask": Draw.joint_mask,
    "class_labels": lambda draw: torch.arange(draw.batch) % 3,
    "added_cond_kwargs": lambda draw: dict(resolution=None, aspect_ratio=None),
    "image_rotary_emb": Draw.rotary,
    "original_size": lambda draw: torch.tensor([[64.0, 48.0]] * draw.batch),
    "target_size": lambda draw: torch.tensor([[64.0, 64.0]] * draw.batch),
    "crop_coords": lambda draw: torch.tensor([[0.0, 8.0]] * draw.batch),
    "img_ids": lambda draw: draw.ids(draw.height, draw.width),
    "txt_ids": lambda draw: 0 * draw.ids(TEXT, 1),
    "img_shapes": lambda draw: [[(1, draw.height, draw.width)]] * draw.batch,
    "num_frames": lambda draw: draw.frames,
    "height": lambda draw: draw.height,
    "width": lambda draw: draw.width,
    "x": lambda draw: list(draw.latent("C F h w").unbind()),
    "cap_feats": lambda draw: [draw.noise(5 + entry, WIDTH)[0] for entry in range(draw.batch)],
}
_PIXART = "added_cond_kwargs encoder_attention_mask"
_TEXT_T5 = "text_embedding_mask encoder_hidden_states_t5 text_embedding_mask_t5 image_rotary_emb"
_SIZES = "original_size target_size crop_coords"
_IDS = "img_ids txt_ids"
_POOLED = "pooled_projections"
_MASK_SHAPES = "encoder_hidden_states_mask img_shapes"
_CONTROL = "control_hidden_states"
_VIDEO_SIZE = "num_frames height width encoder_attention_mask"

_CROSSED = dict(kinds=("attn", "crossattn", "mlp"))
_PACKED = dict(latent="N C", span=1, rotary=True)
_FLUX = dict(_PACKED, compiles="its blocks")
_UPWARDS = dict(compiles="its blocks", span=-1, rotary=True)
_VIDEO = dict(frames=2, latent="C F h w", rotary=True)
_WAN = dict(_VIDEO, **_CROSSED)
_LTX = dict(_WAN, latent="N C")
_JOINS = dict(joins_inside="transformer_blocks")
_COG_VIDEO = dict(_VIDEO, **_JOINS, latent="F C h w")
_COGVIEW4 = dict(_JOINS, kinds=("attn",), rotary=True)
_OLD_PIXART = dict(patch_size=2, norm_type="ada_norm_single", num_embeds_ada_norm=1000)
_HUNYUAN_DIT = dict(patch_size=2, num_layers=4, mlp_ratio=2.0)
_VACE = dict(vace_layers=[0])
_PATCHES = dict(out_channels=1)  # of 2x2 pixels
_SQUARE_ROPE = dict(rope_axes_dim=(32, 32))
_SD35 = dict(num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm")
_Z_IMAGE = dict(axes_dims=[2, 2, 4], axes_lens=[80, 256, 256])
_LUMINA2 = dict(axes_dim_rope=(4, 2, 2), axes_lens=(32, 256, 256))

_FAMILIES = (
    Family("DiT", "DiTTransformer2DModel", "class_labels", base="hidden_states", square=True),
    Family("PixArt-alpha, PixArt-sigma", "PixArtTransformer2DModel", _PIXART, **_CROSSED),
    Family("PixArt, older checkpoints", "Transformer2DModel", _PIXART, _OLD_PIXART, **_CROSSED),
    Family("Hunyuan-DiT", "HunyuanDiT2DModel", _TEXT_T5, _HUNYUAN_DIT, **_CROSSED, rotary=True),
    Family("Stable Diffusion 3", "SD3Transformer2DModel", _POOLED, dict(num_layers=3)),
    Family("Stable Diffusion 3.5", "SD3Transformer2DModel", _POOLED, _SD35),
    Family(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        own=dict(pos_embed_max_size=256**2),
        span=1,
        beside={"single_transformer_blocks": TEXT + 8},  # and its register tokens
        depth="num_single_dit_layers",
    ),
    Family("CogView 3 Plus", "CogView3PlusTransformer2DModel", _SIZES, **_JOINS),
    Family("CogView 4", "CogView4Transformer2DModel", _SIZES, _SQUARE_ROPE, **_COGVIEW4),
    Family("Flux.1", "FluxTransformer2DModel", f"{_IDS} {_POOLED}", **_FLUX),
    Family("Flux.2", "Flux2Transformer2DModel", _IDS, dict(axes_dims_rope=(2, 2, 2, 2)), **_FLUX),
    Family("Chroma", "ChromaTransformer2DModel", f"{_IDS} attention_mask", **_FLUX),
    Family("Bria", "BriaTransformer2DModel", _IDS, **{**_FLUX, "span": 1000}),
    Family("LongCat-Image", "LongCatImageTransformer2DModel", _IDS, **_FLUX),
    Family("Ovis-Image", "OvisImageTransformer2DModel", _IDS, **_FLUX),
    Family("Qwen-Image", "QwenImageTransformer2DModel", _MASK_SHAPES, _PATCHES, **_PACKED),
    Family(
        "Z-Image",
        "ZImageTransformer2DModel",
        "x cap_feats",
        _Z_IMAGE,
        base="",
        # Sequences are filled up to multiples of 32.
        beside={"noise_refiner": 0, "layers": 32},
        depth="n_layers",
        time_name="t",
        **_UPWARDS,
    ),
    Family("Lumina 2", "Lumina2Transformer2DModel", "encoder_attention_mask", _LUMINA2, **_UPWARDS),
    Family("Wan 2.1, 2.2 (video)", "WanTransformer3DModel", **_WAN),
    Family("Wan VACE (video)", "WanVACETransformer3DModel", _CONTROL, _VACE, **_WAN),
    Family("SkyReels V2 (video)", "SkyReelsV2Transformer3DModel", **_WAN),
    Family("LTX-Video (video)", "LTXVideoTransformer3DModel", _VIDEO_SIZE, **_LTX),
    Family("CogVideoX (video)", "CogVideoXTransformer3DModel", "image_rotary_emb", **_COG_VIDEO),
    Family("ConsisID (video)", "ConsisIDTransformer3DModel", "image_rotary_emb", **_COG_VIDEO),
    Family(
        "HunyuanVideo (video)",
        "HunyuanVideoTransformer3DModel",
        f"{_POOLED} encoder_attention_mask",
        joins_inside="single_transformer_blocks",
        **_VIDEO,
    ),
)
TRANSFORMERS = {family.title: family for family in _FAMILIES}
