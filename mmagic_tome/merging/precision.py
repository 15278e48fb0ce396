# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Full precision where a choice depends on it."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which products of ``x`` stay in its dtype.

    Networks are often called under ``torch.autocast``, where a product of float32 tensors is
    computed and returned in half precision. That would undo a ``.float()`` just before it.
    """
    return torch.autocast(device_type=x.device.type, enabled=False)
