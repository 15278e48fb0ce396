# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Several processes: who joins, and who does what."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TypeVar

import torch
from mmengine.dist import broadcast_object_list, get_rank, get_world_size, init_dist

from ..errors import ToMeError

T = TypeVar("T")

# Ranks wait for the slowest. One that dies is noticed by the launcher, at once, and not by this.
PATIENCE_SECONDS = 7 * 24 * 3600


def start_ranks(launcher: str, device: str | torch.device) -> torch.device:
    """Join the processes that a launcher has started.

    Args:
        launcher: ``'none'`` for one process; ``'pytorch'`` (torchrun), ``'slurm'``, ``'mpi'``.
        device: That is asked for.

    Returns:
        torch.device: That of this process: one GPU per local rank.

    Raises:
        ToMeError: No launcher has started this process.
    """
    device = torch.device(device)
    if launcher == "none":
        return device
    try:
        if device.type == "cuda":
            init_dist(launcher, backend="nccl", timeout=PATIENCE_SECONDS)
            return torch.device("cuda", torch.cuda.current_device())
        # mmengine's function selects a GPU whatever the backend.
        patience = datetime.timedelta(seconds=PATIENCE_SECONDS)
        torch.distributed.init_process_group("gloo", timeout=patience)
    except (KeyError, ValueError) as error:  # of an environment variable
        raise ToMeError(
            f"--launcher {launcher}: this process was not started by it ({error}); pytorch is for "
            "torchrun --nproc-per-node N, on CPUs too"
        ) from error
    return device


def share(work: Sequence[T]) -> list[T]:
    """This rank's part of rank 0's list of work: every n-th piece of it."""
    held = [list(work)]
    broadcast_object_list(held)
    return held[0][get_rank() :: get_world_size()]
