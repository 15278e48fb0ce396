# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Devices and precisions by the names that users write."""

from __future__ import annotations

import torch

from ..errors import ToMeError

#: What ``--dtype`` takes -> dtype of the whole model.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name.

    Args:
        name: ``'cpu'``, ``'cuda'``, ``'cuda:N'`` or ``'mps'``. Default: None, CUDA if there is a
            GPU, else the CPU.

    Raises:
        ToMeError: This machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ToMeError(f"device {name!r} is not a device; write cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ToMeError(f"device {name} is not there: torch finds no GPU; write cpu")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ToMeError(f"device {name} is not there: this machine has cuda:0 to {count - 1}")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ToMeError("device mps is not there; write cpu")
    elif device.type != "cpu":
        raise ToMeError(f"device {name!r} is not supported; write cpu, cuda or cuda:N")
    return device
