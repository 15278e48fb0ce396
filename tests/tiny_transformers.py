# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Diffusion transformers small enough for tests, with random weights everywhere.

``TRANSFORMERS`` is what the tests of all of them go through, and ``PIPELINES`` what is run in
diffusers' own pipelines; docs/support.md lists both.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from tiny import randomise

TEXT = 7  # tokens
_WIDTH = 12  # of the text
_HEADS = dict(num_attention_heads=2, attention_head_dim=8)


@dataclass(frozen=True)
class Family:
    """A row of the table: what users call it, the class, and how it can be compiled.

    Attributes:
        call (Callable): (family, :class:`Draw`) -> keyword arguments of a call but the timestep.
        frames (int): of a video.
        square (bool): whether diffusers runs it on square grids only.
        span (float): the timestep of pure noise as its pipelines give it; negative: that of no
            noise, since it is counted in the opposite direction.
        kinds (tuple): kinds of target that its blocks have.
        beside (dict): beginning of a block's name -> tokens besides the image's in its sequences;
            text, where there is one, for the others.
        joins_inside (str): beginning of the names of blocks whose attention puts text and image
            into one sequence itself.
        depth (str): which option says how many blocks its longest list has.
        rotary (bool): whether positions are no part of the tokens.
    """

    title: str
    class_name: str
    options: dict
    call: Callable
    compiles: str = "the whole network"
    frames: int = 1
    square: bool = False
    span: float = 1000
    kinds: tuple = ("attn", "mlp")
    beside: dict = field(default_factory=dict)
    joins_inside: str = " "
    depth: str = "num_layers"
    rotary: bool = False

    @property
    def grids(self):
        """Odd ones that it is tested on, (height, width) in tokens of a frame."""
        return ((9, 9), (5, 5)) if self.square else ((9, 7), (3, 20), (8, 8))

    @property
    def large_grids(self):
        """Large ones, with one image at a time."""
        return ((33, 33),) if self.square else ((33, 31), (17, 90), (8, 200))

    @property
    def next_time(self):
        """A timestep soon after 500; of whole ones where diffusers wants these."""
        return 499.9 if self.span != 1000 or self.title == "Hunyuan-DiT" else 499

    @property
    def inner(self):
        """Targets inside its blocks, to merge at together."""
        return [kind for kind in ("attn", "mlp") if kind in self.kinds]

    def build(self, seed=0):
        """The network, in eval mode."""
        import diffusers

        torch.manual_seed(seed)
        return randomise(getattr(diffusers, self.class_name)(**self.options), seed)

    def deeper(self, blocks):
        """The same with so many blocks in its longest list."""
        return replace(self, options={**self.options, self.depth: blocks})

    def tokens(self, grid=(8, 8)):
        """How many there are."""
        return self.frames * grid[0] * grid[1]

    def inputs(self, grid=(8, 8), batch=2, seed=0, time=500):
        """Keyword arguments of a call, for frames of so many tokens (height, width).

        ``time`` is of 1000 steps, 1000 being pure noise.
        """
        if self.span == 1000:
            # Hunyuan-DiT computes in the timestep's type.
            time = float(time) if self.title == "Hunyuan-DiT" else time
            timestep = torch.full((batch,), time)
        elif self.span < 0:
            timestep = torch.full((batch,), 1 - time / 1000)
        else:
            timestep = torch.full((batch,), time / 1000 * self.span)
        name = "t" if self.class_name == "ZImageTransformer2DModel" else "timestep"
        return {name: timestep, **self.call(self, Draw(grid, batch, seed))}


class Draw:
    """Random inputs for a grid and a batch."""

    def __init__(self, grid, batch, seed):
        self.height, self.width = grid
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape):
        return torch.randn(self.batch, *shape, generator=self.generator)

    def latent(self, *front):
        """(B, *front, 2 h, 2 w)."""
        return self.noise(*front, 2 * self.height, 2 * self.width)

    def packed(self, frames=1):
        """(B, N, 4)."""
        return self.noise(frames * self.height * self.width, 4)

    def text(self, length=TEXT):
        """(B, L, 12)."""
        return self.noise(length, _WIDTH)

    def mask(self, length=TEXT, dtype=torch.float32):
        """(B, L), with an end that is padding in the first entry."""
        mask = torch.ones(self.batch, length, dtype=dtype)
        mask[0, -2:] = 0
        return mask

    def rotary(self, tokens):
        """Cosines and sines (N, 8)."""
        angle = torch.randn(tokens, 8, generator=self.generator)
        return angle.cos(), angle.sin()


def image_ids(height, width, axes=3):
    """(height * width, axes) position ids as Flux' pipelines make them."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.view(-1, axes)


# --- what they are called with --------------------------------------------------------------------


def _dit(family, draw):
    labels = torch.arange(draw.batch) % 3
    return dict(hidden_states=draw.latent(4), class_labels=labels)


def _pixart(family, draw):
    return dict(
        hidden_states=draw.latent(4),
        encoder_hidden_states=draw.text(),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
        encoder_attention_mask=draw.mask(),
    )


def _sd3(family, draw):
    return dict(
        hidden_states=draw.latent(4),
        encoder_hidden_states=draw.text(),
        pooled_projections=draw.noise(_WIDTH),
    )


def _auraflow(family, draw):
    return dict(hidden_states=draw.latent(4), encoder_hidden_states=draw.text())


def _flux(family, draw, axes=3):
    return dict(
        hidden_states=draw.packed(),
        encoder_hidden_states=draw.text(),
        img_ids=image_ids(draw.height, draw.width, axes),
        txt_ids=torch.zeros(TEXT, axes),
    )


def _flux1(family, draw):
    return dict(**_flux(family, draw), pooled_projections=draw.noise(_WIDTH))


def _flux2(family, draw):
    return _flux(family, draw, axes=4)


def _chroma(family, draw):
    image = torch.ones(draw.batch, draw.height * draw.width)
    return dict(**_flux(family, draw), attention_mask=torch.cat([draw.mask(), image], dim=1))


def _qwen(family, draw):
    return dict(
        hidden_states=draw.packed(),
        encoder_hidden_states=draw.text(),
        encoder_hidden_states_mask=draw.mask(dtype=torch.bool),
        img_shapes=[[(1, draw.height, draw.width)]] * draw.batch,
    )


def _z_image(family, draw):
    lengths = [5 + entry for entry in range(draw.batch)]
    return dict(
        x=list(draw.latent(4, 1).unbind()),
        cap_feats=[draw.text(length)[0] for length in lengths],
    )


def _lumina2(family, draw):
    return dict(
        hidden_states=draw.latent(4),
        encoder_hidden_states=draw.text(),
        encoder_attention_mask=draw.mask(dtype=torch.int64),
    )


def _cogview(family, draw):
    sizes = dict(original_size=[64.0, 48.0], target_size=[64.0, 64.0], crop_coords=[0.0, 8.0])
    return dict(
        hidden_states=draw.latent(4),
        encoder_hidden_states=draw.text(),
        **{name: torch.tensor([size] * draw.batch) for name, size in sizes.items()},
    )


def _hunyuan_dit(family, draw):
    return dict(
        hidden_states=draw.latent(4),
        encoder_hidden_states=draw.text(),
        text_embedding_mask=draw.mask(),
        encoder_hidden_states_t5=draw.noise(5, 16),
        text_embedding_mask_t5=draw.mask(5),
        image_rotary_emb=draw.rotary(draw.height * draw.width),
    )


def _wan(family, draw):
    return dict(hidden_states=draw.latent(4, family.frames), encoder_hidden_states=draw.text())


def _vace(family, draw):
    return dict(**_wan(family, draw), control_hidden_states=draw.latent(4, family.frames))


def _cogvideox(family, draw):
    return dict(
        hidden_states=draw.latent(family.frames, 4),
        encoder_hidden_states=draw.text(),
        image_rotary_emb=draw.rotary(family.frames * draw.height * draw.width),
    )


def _ltx(family, draw):
    return dict(
        hidden_states=draw.packed(family.frames),
        encoder_hidden_states=draw.text(),
        encoder_attention_mask=draw.mask(),
        num_frames=family.frames,
        height=draw.height,
        width=draw.width,
    )


def _hunyuan_video(family, draw):
    return dict(
        hidden_states=draw.latent(4, family.frames),
        encoder_hidden_states=draw.text(),
        encoder_attention_mask=draw.mask(),
        pooled_projections=draw.noise(_WIDTH),
    )


# --- what they are built with ---------------------------------------------------------------------

_PATCHES = dict(
    **_HEADS,
    in_channels=4,
    num_layers=2,
    sample_size=16,
    patch_size=2,
    norm_elementwise_affine=False,
)
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
    pos_embed_max_size=256,
)
_AURAFLOW = dict(
    **_HEADS,
    sample_size=32,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_mmdit_layers=2,
    num_single_dit_layers=2,
    joint_attention_dim=_WIDTH,
    caption_projection_dim=16,
    pos_embed_max_size=256**2,
)
_CHROMA = dict(
    **_HEADS,
    patch_size=1,
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=_WIDTH,
    axes_dims_rope=(2, 2, 4),
)
_FLUX = dict(**_CHROMA, pooled_projection_dim=_WIDTH)
_FLUX2 = dict(**_CHROMA, guidance_embeds=False, timestep_guidance_channels=16)
_FLUX2["axes_dims_rope"] = (2, 2, 2, 2)
_QWEN = dict(
    **_HEADS,
    patch_size=2,
    in_channels=4,
    out_channels=1,
    num_layers=2,
    joint_attention_dim=_WIDTH,
    axes_dims_rope=(2, 2, 4),
)
_Z_IMAGE = dict(
    in_channels=4,
    dim=16,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=_WIDTH,
    axes_dims=[2, 2, 4],
    axes_lens=[80, 256, 256],
)
_LUMINA2 = dict(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    hidden_size=16,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=8,
    axes_dim_rope=(4, 2, 2),
    axes_lens=(32, 256, 256),
    cap_feat_dim=_WIDTH,
)
_COGVIEW = dict(
    **_HEADS,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    text_embed_dim=_WIDTH,
    time_embed_dim=8,
    condition_dim=4,
    pos_embed_max_size=256,
    sample_size=16,
)
_HUNYUAN_DIT = dict(
    **_HEADS,
    in_channels=4,
    patch_size=2,
    sample_size=16,
    hidden_size=16,
    num_layers=4,
    mlp_ratio=2.0,
    learn_sigma=False,
    cross_attention_dim=_WIDTH,
    cross_attention_dim_t5=16,
    pooled_projection_dim=_WIDTH,
    text_len=TEXT,
    text_len_t5=5,
    use_style_cond_and_image_meta_size=False,
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
_LTX = dict(
    **_HEADS,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    cross_attention_dim=16,
    caption_channels=_WIDTH,
)
_HUNYUAN_VIDEO = dict(
    **_HEADS,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    guidance_embeds=False,
    text_embed_dim=_WIDTH,
    pooled_projection_dim=_WIDTH,
    rope_axes_dim=(2, 2, 4),
)
_CROSSED = ("attn", "crossattn", "mlp")

TRANSFORMERS = {
    family.title: family
    for family in (
        Family(
            "DiT",
            "DiTTransformer2DModel",
            dict(**_PATCHES, num_embeds_ada_norm=10),
            _dit,
            square=True,
        ),
        Family(
            "PixArt-alpha, PixArt-sigma",
            "PixArtTransformer2DModel",
            _PIXART,
            _pixart,
            kinds=_CROSSED,
        ),
        Family(
            "PixArt, older checkpoints",
            "Transformer2DModel",
            dict(**_PIXART, norm_type="ada_norm_single", num_embeds_ada_norm=1000),
            _pixart,
            kinds=_CROSSED,
        ),
        Family(
            "Hunyuan-DiT",
            "HunyuanDiT2DModel",
            _HUNYUAN_DIT,
            _hunyuan_dit,
            kinds=_CROSSED,
            rotary=True,
        ),
        Family("Stable Diffusion 3", "SD3Transformer2DModel", _SD3, _sd3),
        Family(
            "Stable Diffusion 3.5",
            "SD3Transformer2DModel",
            dict(**_SD3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
            _sd3,
        ),
        Family(
            "AuraFlow",
            "AuraFlowTransformer2DModel",
            _AURAFLOW,
            _auraflow,
            span=1,
            beside={"single_transformer_blocks": TEXT + 8},  # and its register tokens
            depth="num_single_dit_layers",
        ),
        Family(
            "CogView 3 Plus",
            "CogView3PlusTransformer2DModel",
            _COGVIEW,
            _cogview,
            joins_inside="transformer_blocks",
        ),
        Family(
            "CogView 4",
            "CogView4Transformer2DModel",
            dict(**_COGVIEW, rope_axes_dim=(32, 32)),
            _cogview,
            kinds=("attn",),
            joins_inside="transformer_blocks",
            rotary=True,
        ),
        Family(
            "Flux.1",
            "FluxTransformer2DModel",
            _FLUX,
            _flux1,
            compiles="its blocks",
            span=1,
            rotary=True,
        ),
        Family(
            "Flux.2",
            "Flux2Transformer2DModel",
            _FLUX2,
            _flux2,
            compiles="its blocks",
            span=1,
            rotary=True,
        ),
        Family(
            "Chroma",
            "ChromaTransformer2DModel",
            dict(
                **_CHROMA,
                approximator_num_channels=16,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
            _chroma,
            compiles="its blocks",
            span=1,
            rotary=True,
        ),
        Family(
            "Bria",
            "BriaTransformer2DModel",
            _FLUX,
            _flux,
            compiles="its blocks",
            rotary=True,
        ),
        Family(
            "LongCat-Image",
            "LongCatImageTransformer2DModel",
            _FLUX,
            _flux,
            compiles="its blocks",
            span=1,
            rotary=True,
        ),
        Family(
            "Ovis-Image",
            "OvisImageTransformer2DModel",
            dict(**_CHROMA, out_channels=4),
            _flux,
            compiles="its blocks",
            span=1,
            rotary=True,
        ),
        Family("Qwen-Image", "QwenImageTransformer2DModel", _QWEN, _qwen, span=1, rotary=True),
        Family(
            "Z-Image",
            "ZImageTransformer2DModel",
            _Z_IMAGE,
            _z_image,
            compiles="its blocks",
            span=-1,
            # Sequences are filled up to multiples of 32.
            beside={"noise_refiner": 0, "layers": 32},
            depth="n_layers",
            rotary=True,
        ),
        Family(
            "Lumina 2",
            "Lumina2Transformer2DModel",
            _LUMINA2,
            _lumina2,
            compiles="its blocks",
            span=-1,
            rotary=True,
        ),
        Family(
            "Wan 2.1, 2.2 (video)",
            "WanTransformer3DModel",
            _WAN,
            _wan,
            frames=2,
            kinds=_CROSSED,
            rotary=True,
        ),
        Family(
            "Wan VACE (video)",
            "WanVACETransformer3DModel",
            dict(**_WAN, vace_layers=[0], vace_in_channels=4),
            _vace,
            frames=2,
            kinds=_CROSSED,
            rotary=True,
        ),
        Family(
            "SkyReels V2 (video)",
            "SkyReelsV2Transformer3DModel",
            _WAN,
            _wan,
            frames=2,
            kinds=_CROSSED,
            rotary=True,
        ),
        Family(
            "LTX-Video (video)",
            "LTXVideoTransformer3DModel",
            _LTX,
            _ltx,
            frames=2,
            kinds=_CROSSED,
            rotary=True,
        ),
        Family(
            "CogVideoX (video)",
            "CogVideoXTransformer3DModel",
            _COGVIDEOX,
            _cogvideox,
            frames=2,
            joins_inside="transformer_blocks",
            rotary=True,
        ),
        Family(
            "ConsisID (video)",
            "ConsisIDTransformer3DModel",
            dict(**_COGVIDEOX, is_train_face=False),
            _cogvideox,
            frames=2,
            joins_inside="transformer_blocks",
            rotary=True,
        ),
        Family(
            "HunyuanVideo (video)",
            "HunyuanVideoTransformer3DModel",
            _HUNYUAN_VIDEO,
            _hunyuan_video,
            frames=2,
            joins_inside="single_transformer_blocks",
            rotary=True,
        ),
    )
}


# --- pipelines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """diffusers' own pipeline around a family, without text encoders and decoder.

    Attributes:
        class_name (str): of the pipeline.
        call (dict): arguments of a call, for a image of 48 tokens or a clip of so many a frame.
        tokens (int): how many there are.
        guided (bool): whether it calls the network twice per step, with and without the text.
    """

    class_name: str
    call: dict
    tokens: int = 48
    guided: bool = False

    def build(self, family):
        """The pipeline, silent."""
        import diffusers

        kind = getattr(diffusers, self.class_name)
        needed = inspect.signature(kind.__init__).parameters.values()
        parts = {p.name: None for p in needed if p.default is p.empty and p.name != "self"}
        # LTX-Video insists on it.
        dynamic = self.class_name == "LTXPipeline"
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic)
        pipeline = kind(**{**parts, "scheduler": scheduler, "transformer": family.build()})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(self, pipeline):
        """Latents of four steps."""
        out = pipeline(
            **self.call,
            height=128,
            width=96,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        return out[0]


def _text(length=TEXT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, length, _WIDTH, generator=generator)


def _prompts(negative=TEXT):
    """Of a prompt, and of one with so many tokens."""
    return dict(prompt_embeds=_text(), negative_prompt_embeds=_text(negative, seed=1))


def _masks(**like):
    masks = dict(prompt_attention_mask=torch.ones(1, TEXT, **like))
    masks["negative_prompt_attention_mask"] = torch.ones(1, TEXT, **like)
    masks["negative_prompt_attention_mask"][:, 4:] = 0
    return masks


def _qwen_masks():
    return dict(
        prompt_embeds_mask=torch.ones(1, TEXT, dtype=torch.int64),
        negative_prompt_embeds_mask=torch.ones(1, 5, dtype=torch.int64),
    )


def _pooled():
    return dict(pooled_prompt_embeds=_text(seed=2)[:, 0])


PIPELINES = {
    "Stable Diffusion 3": Pipeline(
        "StableDiffusion3Pipeline",
        {**_prompts(), **_pooled(), "negative_pooled_prompt_embeds": _text(seed=3)[:, 0]},
    ),
    "Flux.1": Pipeline("FluxPipeline", dict(prompt_embeds=_text(), **_pooled())),
    "AuraFlow": Pipeline("AuraFlowPipeline", {**_prompts(), **_masks()}),
    "CogView 4": Pipeline("CogView4Pipeline", _prompts(5), guided=True),
    "Flux.2": Pipeline("Flux2Pipeline", dict(prompt_embeds=_text())),
    "Chroma": Pipeline("ChromaPipeline", {**_prompts(), **_masks()}, guided=True),
    "Qwen-Image": Pipeline(
        "QwenImagePipeline", {**_prompts(5), **_qwen_masks(), "true_cfg_scale": 3.0}, guided=True
    ),
    "Z-Image": Pipeline("ZImagePipeline", {k: [v[0]] for k, v in _prompts(5).items()}),
    "Lumina 2": Pipeline(
        "Lumina2Pipeline", {**_prompts(), **_masks(dtype=torch.int64)}, guided=True
    ),
    "Wan 2.1, 2.2 (video)": Pipeline(
        "WanPipeline", {**_prompts(), "num_frames": 5}, tokens=96, guided=True
    ),
    "LTX-Video (video)": Pipeline(
        "LTXPipeline", {**_prompts(), **_masks(), "num_frames": 9}, tokens=24
    ),
    "HunyuanVideo (video)": Pipeline(
        "HunyuanVideoPipeline",
        dict(
            prompt_embeds=_text(),
            **_pooled(),
            prompt_attention_mask=torch.ones(1, TEXT),
            num_frames=5,
        ),
        tokens=96,
    ),
}
