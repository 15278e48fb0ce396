# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Several processes: who joins, and who does what."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from mmengine.dist import broadcast_object_list, get_rank, get_world_size

from ..errors import ToMeError

T = TypeVar("T")

# Ranks wait for the slowest. One that dies is noticed by the launcher, at once, and not by this.
PATIENCE = datetime.timedelta(days=7)


def start_ranks(launcher: str, device: str | torch.device) -> torch.device:
    """Join the processes that a launcher has started, ``'none'`` for one process or ``'pytorch'``
    for torchrun's; return the device of this process: one GPU per local rank. ToMeError: torchrun
    has not started it."""
    device = torch.device(device)
    if launcher == "none":
        return device
    if "RANK" not in os.environ:
        raise ToMeError(
            "--launcher pytorch: this process was not started by it (RANK is not set); write "
            "torchrun --nproc-per-node N tools/evaluate.py ..."
        )
    # mmengine's function selects a GPU, also where there is none.
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def share(work: Sequence[T]) -> list[T]:
    """This rank's part of rank 0's list of work: every n-th piece of it."""
    held = [list(work)]
    broadcast_object_list(held)
    return held[0][get_rank() :: get_world_size()]
