# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CogVideoX (video), CogView 3 Plus and 4 (images) in diffusers: joint attention.

A block receives and returns (image or video, text) tokens; its feed-forward runs on both in one
sequence, text first. Targets: ``attn`` = ``attn1``, ``mlp`` = ``ff``.
"""

from __future__ import annotations

from .transformer import JOINT, RotaryTransformer, Transformer

_REFUSED = dict(
    JOINT["refused"],
    mlp="one feed-forward runs on the image tokens and then on the text tokens. Write "
    "targets=['attn'] or targets='block'",
)
_LISTS = (("transformer_blocks", dict(JOINT, attn="attn1", joint_sequence=("mlp",))),)


class CogVideoX(RotaryTransformer):
    """``CogVideoXTransformer3DModel``, with and without rotary embeddings, and
    ``ConsisIDTransformer3DModel``, which attends to a face between its blocks."""

    description = "CogVideoX (CogVideoXTransformer3DModel, ConsisIDTransformer3DModel)"
    class_names = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    timestep_position = 2
    lists = _LISTS
    frames_axis = 1


class CogView3Plus(Transformer):
    """``CogView3PlusTransformer2DModel``: positions are added to the tokens once, before the first
    block."""

    description = "CogView 3 Plus (CogView3PlusTransformer2DModel)"
    class_names = ("CogView3PlusTransformer2DModel",)
    timestep_position = 2
    lists = _LISTS


class CogView4(RotaryTransformer):
    """``CogView4Transformer2DModel``: no target ``mlp``."""

    description = "CogView 4 (CogView4Transformer2DModel)"
    class_names = ("CogView4Transformer2DModel",)
    timestep_position = 2
    takes_masks = True  # they cover text only
    lists = (("transformer_blocks", dict(JOINT, attn="attn1", mlp=None, refused=_REFUSED)),)
