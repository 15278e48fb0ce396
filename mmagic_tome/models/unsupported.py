# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks of diffusers that cannot be merged, or not yet, and why: for error messages."""

from __future__ import annotations

import re

_LINEAR = (
    "its attention is linear: it costs as much per token as any other layer, so that fewer tokens "
    "save little there, and its feed-forward is a convolution over the grid, which needs all tokens"
)
_MIXED = (
    "its self-attention and cross-attention give heads back apart, with one projection behind both "
    "attentions, so that neither is a site of its own"
)
_SEVERAL = (
    "it holds several ControlNets, each with token merging of its own: call apply_tome with every "
    "one of its .nets"
)
_SOUND = "its tokens follow each other in time, on no grid of rows and columns"
_HISTORY = (
    "frames of several resolutions are in its sequence, so that its tokens lie on no one grid"
)
_HINTS = (
    "branches beside its blocks work on tokens of their own for every place (a pose, a face), and "
    "a host that merges both alike is not written"
)
_EMBEDDING = "its tokens are an embedding and a text, not places of a picture"
_FRAMES = "it attends along the frames of one place, of which there are few"
_NO_HOST = "no host is written for this diffusion transformer"
_BRANCH = (
    "no host is written for a ControlNet of this kind; merge the network that it controls, as "
    "apply_tome(pipeline) does"
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
    "RFD4Proteina": "its tokens are parts of a protein, on no grid of rows and columns",
    "PriorTransformer": _EMBEDDING,
    "TransformerTemporalModel": _FRAMES,
}
# What else looks like one of diffusers' diffusion transformers.
_TRANSFORMER = re.compile(r"(Transformer([123]D)?(Model)?|DiT(2D)?Model)$")


def why_unsupported(name: str) -> str:
    """A sentence on a class of that name, with a space after it; empty if none is known."""
    for beginning, reason in _REASONS.items():
        if name.startswith(beginning):
            return f"{name}: {reason}. "
    if name.endswith("ControlNetModel"):
        return f"{name}: {_BRANCH}. "
    return f"{name}: {_NO_HOST}. " if _TRANSFORMER.search(name) else ""
