# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The latents in a call of a network, and the prediction in what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements per image that are compared, so that nothing grows with the size of a video.
_SAMPLES = 1 << 12


def read_timestep(timestep: Any) -> tuple[float | None, bool]:
    """The first timestep of a call, and whether it is that of all images; synchronizes with the
    device."""
    if not isinstance(timestep, Tensor):
        return (None if timestep is None else float(timestep)), True
    first, *others = timestep.detach().reshape(-1).tolist()
    return float(first), all(other == first for other in others)


def latents_of(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """What a network is called to denoise; empty if it is not known."""
    named = (kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs)
    x = args[0] if args else next(named, None)
    if x is None:
        x = next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    latents = tuple(x) if isinstance(x, list) else (x,)
    return latents if all(isinstance(one, Tensor) for one in latents) else ()


def conditioning_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """What a network is conditioned on, such as the text; None if it is not known."""
    named = map(kwargs.get, ("encoder_hidden_states", "context", "class_labels"))
    given = [*named, *(one for one in args[1:] if isinstance(one, Tensor) and one.dim() > 1)]
    return next((one for one in given if isinstance(one, Tensor)), None)


def tensors_of(output: Any) -> list[Tensor]:
    """The prediction in what a network returned: its first tensor, or a list of tensors."""
    while isinstance(output, (Mapping, list, tuple)) and output:
        if isinstance(output, list) and isinstance(output[0], Tensor):
            return list(output)
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return [output] if isinstance(output, Tensor) else []


def cropped(x: Tensor, other: Tensor | None) -> Tensor:
    """The front part of ``x`` that ``other`` has as well: latents come before what is attached."""
    if other is None or other.dim() != x.dim():
        return x
    return x[tuple(map(slice, other.shape))]


def sampled(tensors: Sequence[Tensor]) -> Tensor:
    """(B, n) float32 copy: every n-th element of a batch, or of each of several tensors, as far as
    the smallest goes."""
    if len(tensors) == 1:
        rows = tensors[0].detach().reshape(len(tensors[0]), -1)
    else:
        shortest = min(x.numel() for x in tensors)
        rows = torch.stack([x.detach().flatten()[:shortest] for x in tensors])
    # An odd stride meets all rows and columns.
    stride = max(1, rows.shape[1] // _SAMPLES) | 1
    return rows[:, ::stride].float().clone()


def count_copies(x: Tensor) -> int:
    """Into how many equal parts a batch falls: 3, 2 or 1."""
    for count in (2, 3):
        if x.shape[0] % count == 0:
            first, *others = x.chunk(count)
            if all(torch.equal(first, other) for other in others):
                return count
    return 1
