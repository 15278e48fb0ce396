# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks of diffusers that cannot be merged, or not yet, and why: for error messages."""

from __future__ import annotations

import re

_LINEAR = (
    "its attention is linear in the number of tokens, so merging saves little there, and its "
    "feed-forward is a convolution, which needs the full grid"
)
_MIXED = (
    "self- and cross-attention share one output projection, so they cannot be merged separately"
)
_SEVERAL = "it contains several ControlNets: call apply_tome with each of its .nets"
_SOUND = "its tokens form a time series, not a grid of rows and columns"
_HISTORY = (
    "its sequence contains frames at several resolutions, so the tokens do not form a single grid"
)
_HINTS = (
    "pose and face branches add to the tokens of every position, and no adapter is written that "
    "merges both"
)
_EMBEDDING = "its tokens are an embedding and a text, not positions of an image"
_FRAMES = "it attends along the frames of one position, and there are few of them"
_NO_UNET = "its blocks are not diffusers' transformer blocks, and no adapter is written for them"
_NO_ADAPTER = "no adapter is written for this diffusion transformer"
_BRANCH = (
    "no adapter is written for this kind of ControlNet; apply_tome(pipeline) merges the network "
    "that it controls"
)

# Beginning of a class name -> why.
_REASONS = {
    "MultiControlNetModel": _SEVERAL,
    "FluxMultiControlNet": _SEVERAL,
    "SanaTransformer": _LINEAR,
    "SanaVideoTransformer": _LINEAR,
    "SanaWMTransformer": _LINEAR,
    "LuminaNext": _MIXED,
    "HunyuanVideoFramepack": _HISTORY,
    "Helios": _HISTORY,
    "WanAnimate": _HINTS,
    "StableAudio": _SOUND,
    "AceStep": _SOUND,
    "LongCatAudio": _SOUND,
    "MiniMaxMusic": _SOUND,
    "T5FilmDecoder": _SOUND,
    "RFD4Proteina": "its tokens are parts of a protein, not a grid of rows and columns",
    "PriorTransformer": _EMBEDDING,
    "TransformerTemporalModel": _FRAMES,
    "StableCascadeUNet": _NO_UNET,
    "WuerstchenPrior": _NO_UNET,
    "WuerstchenDiffNeXt": _NO_UNET,
}
# Other class names of diffusers' diffusion transformers.
_TRANSFORMER = re.compile(r"(Transformer([123]D)?(Model)?|DiT(2D)?Model)$")


def why_unsupported(name: str) -> str:
    """Return a sentence on a class of that name and a space; empty if no reason is known."""
    for beginning, reason in _REASONS.items():
        if name.startswith(beginning):
            return f"{name}: {reason}. "
    if name.endswith("ControlNetModel"):
        return f"{name}: {_BRANCH}. "
    return f"{name}: {_NO_ADAPTER}. " if _TRANSFORMER.search(name) else ""
