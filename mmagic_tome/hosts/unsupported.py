# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks of diffusers that cannot be merged, or not yet, and why: for error messages."""

from __future__ import annotations

_LINEAR = (
    "its attention is linear: it costs as much per token as any other layer, so that fewer tokens "
    "save little there, and its feed-forward is a convolution over the grid, which needs all tokens"
)
_FRAMES = (
    "its tokens lie on a grid of frames, rows and columns, and a host that describes one is not "
    "written"
)
_JOINED = (
    "its blocks work on text and picture in one sequence, in which the picture begins at another "
    "place for every prompt, and a host that describes that is not written"
)
_MIXED = (
    "its self-attention and cross-attention give heads back apart, with one projection behind both "
    "attentions, so that neither is a site of its own"
)

_SEVERAL = (
    "it holds several ControlNets, each with token merging of its own: call apply_tome with every "
    "one of its .nets"
)

# Beginning of a class name -> why.
_REASONS = {
    "MultiControlNetModel": _SEVERAL,
    "SanaTransformer": _LINEAR,
    "SanaVideoTransformer": _LINEAR,
    "LuminaNext": _MIXED,
    "Lumina2": _JOINED,
    "ZImageTransformer": _JOINED,
    "WanVACE": _FRAMES,
    "WanAnimate": _FRAMES,
    "HunyuanVideo": _FRAMES,
    "LTX": _FRAMES,
    "MochiTransformer": _FRAMES,
    "AllegroTransformer": _FRAMES,
    "LatteTransformer": _FRAMES,
}


def why_unsupported(name: str) -> str:
    """A sentence on a class of that name, with a space after it; empty if none is known."""
    for beginning, reason in _REASONS.items():
        if name.startswith(beginning):
            return f"{name}: {reason}. "
    return ""
