# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Random numbers that depend on their key alone.

A generator has a state, so that the same seed may yield two different images. Here a number is a
hash of (key, counter), computed in plain tensor arithmetic: no generator is read or advanced, the
device does not matter, nothing is copied to the host, and a compiler sees ordinary operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# An odd 27-bit constant: a 32-bit value times it stays below 2**63, so int64 never overflows.
_MULTIPLIER = 0x45D9F3B


def mix32(x: Tensor) -> Tensor:
    """Scramble 32-bit values (two multiply-xorshift rounds); int64 in and out, same shape."""
    x = x & _MASK
    x = ((x >> 16) ^ x) * _MULTIPLIER & _MASK
    x = ((x >> 16) ^ x) * _MULTIPLIER & _MASK
    return (x >> 16) ^ x


def step_key(timestep: Tensor) -> Tensor:
    """A 0-dim int64 key from a timestep of any numeric dtype, without synchronizing.

    Two timesteps have the same key exactly if they are the same float32.
    """
    return timestep.to(torch.float32).view(torch.int32).to(torch.int64) & _MASK


def hashed_integers(
    upper: int, seed: int, step: Tensor | None, rows: int, columns: int, device: torch.device
) -> Tensor:
    """Uniform (rows, columns) int64 in ``[0, upper)``, keyed by (seed, step, row, column); the
    step is of :func:`step_key`, None: the numbers of no step."""
    row = torch.arange(rows, device=device)
    # The seed may have more than 32 bits: fold both halves in, one after the other.
    key = mix32(row + 0x9E3779B9)
    key = mix32(key ^ (seed & _MASK))
    key = mix32(key ^ ((seed >> 32) & _MASK))
    if step is not None:
        key = mix32(key ^ step.to(device))
    column = mix32(torch.arange(columns, device=device) + 0x7F4A7C15)
    return mix32(key[:, None] ^ column[None, :]) * upper >> 32
