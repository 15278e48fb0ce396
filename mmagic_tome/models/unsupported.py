# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks of diffusers that cannot be merged, or not yet, and why: for error messages."""

from __future__ import annotations

import re

# Pattern of a class name -> why. The first that matches from the beginning counts.
_REASONS = {
    "(MultiControlNetModel|FluxMultiControlNet)": (
        "it contains several ControlNets: call apply_tome with each of its .nets"
    ),
    "Sana(Video|WM)?Transformer": (
        "its attention is linear in the number of tokens, so merging saves little there, and its "
        "feed-forward is a convolution, which needs the full grid"
    ),
    "LuminaNext": (
        "self- and cross-attention share one output projection, so they cannot be merged separately"
    ),
    "(HunyuanVideoFramepack|Helios)": (
        "its sequence contains frames at several resolutions, so the tokens do not form a single "
        "grid"
    ),
    "WanAnimate": (
        "pose and face branches add to the tokens of every position, and no adapter is written "
        "that merges both"
    ),
    "(StableAudio|AceStep|LongCatAudio|MiniMaxMusic|T5FilmDecoder)": (
        "its tokens form a time series, not a grid of rows and columns"
    ),
    "RFD4Proteina": "its tokens are parts of a protein, not a grid of rows and columns",
    "PriorTransformer": "its tokens are an embedding and a text, not positions of an image",
    "TransformerTemporalModel": (
        "it attends along the frames of one position, and there are few of them"
    ),
    "(StableCascadeUNet|WuerstchenPrior|WuerstchenDiffNeXt)": (
        "its blocks are not diffusers' transformer blocks, and no adapter is written for them"
    ),
    ".*ControlNetModel$": (
        "no adapter is written for this kind of ControlNet; apply_tome(pipeline) merges the "
        "network that it controls"
    ),
    # Other diffusion transformers of diffusers.
    ".*(Transformer([123]D)?(Model)?|DiT(2D)?Model)$": (
        "no adapter is written for this diffusion transformer"
    ),
}


def why_unsupported(name: str) -> str:
    """Return a sentence on a class of that name and a space; empty if no reason is known."""
    reasons = (reason for pattern, reason in _REASONS.items() if re.match(pattern, name))
    reason = next(reasons, None)
    return f"{name}: {reason}. " if reason else ""
