# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Devices and precisions by the names that users write."""

from __future__ import annotations

import torch

from ..errors import ToMeError

#: What ``--dtype`` takes -> dtype of the whole model.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name: ``'cpu'``, ``'cuda'``, ``'cuda:N'`` or ``'mps'``. Default: CUDA if
    there is a GPU, else the CPU. ToMeError: this machine has no such device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ToMeError(f"device {name!r} is not there: {reason}; write cpu or cuda:N") from None
    return torch.device(name)
