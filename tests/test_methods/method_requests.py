# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Requests and tokens for tests of methods, without a network."""

import torch

from mmagic_tome.merging import random_layout
from mmagic_tome.methods import METHODS, PlanRequest

# Every method with its defaults, and with options that lead another way.
SPECS = [*sorted(METHODS), dict(type="todo", downsample_factor=3)]


def request(height, width, seed=0, **changes):
    """A PlanRequest for a grid; keywords replace its fields."""
    fields = dict(
        **dict(height=height, width=width, sx=2, sy=2, level=0, exact=True),
        layout=lambda: random_layout(height, width, seed=seed).select(0),
    )
    return PlanRequest(**{**fields, **changes})


def tokens(batch, height, width, channels=8, seed=0):
    """(B, N, C) random tokens that vary smoothly over the grid, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    size = ((height + 2) // 3, (width + 2) // 3)
    smooth = torch.randn(batch, channels, *size, generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")
    noise = torch.randn(batch, channels, height, width, generator=generator)
    return (smooth + 0.3 * noise).flatten(2).transpose(1, 2).contiguous()


def name_of(spec):
    """A test's id for a ``method=`` of a config."""
    if isinstance(spec, str):
        return spec
    return spec["type"] + "".join(f"-{k}={v}" for k, v in spec.items() if k != "type")
