# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""One process or many: who does what, and who waits for whom.

The ranks share nothing but the folder of the evaluation: each commits whole pictures and
whole chunks of metrics there, and rank 0 puts them together. That is as exact as one process,
and a rank that dies loses only the batch that it was at.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import ToMeError

T = TypeVar("T")
LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
# Ranks wait for the slowest: at the end of the pictures, and while rank 0 measures the cost.
# A rank that dies is noticed by the launcher, at once, and not by this.
PATIENCE_SECONDS = 7 * 24 * 3600
# A folder on a network file system may show a file to others with some delay.
SHOW_UP_SECONDS = 30.0


class Team:
    """The processes of an evaluation.

    Args:
        launcher: ``'none'`` for one process; else one that mmengine knows. ``torchrun`` is
            ``'pytorch'``.
        device_type: ``'cuda'`` for NCCL, else gloo.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    def __init__(self, launcher: str = "none", device_type: str = "cpu") -> None:
        self.rank, self.size = 0, 1
        if launcher == "none":
            return
        if launcher == "pytorch" and "RANK" not in os.environ:
            raise ToMeError(
                "--launcher pytorch is for torchrun; use tools/dist_evaluate.sh CONFIG N"
            )
        from mmengine.dist import get_rank, get_world_size, init_dist

        if launcher == "pytorch" and device_type != "cuda":
            # mmengine's selects a GPU by the rank, which fails where there is none.
            patience = datetime.timedelta(seconds=PATIENCE_SECONDS)
            torch.distributed.init_process_group("gloo", timeout=patience)
        else:
            backend = "nccl" if device_type == "cuda" else "gloo"
            init_dist(launcher, backend=backend, timeout=PATIENCE_SECONDS)
        self.rank, self.size = get_rank(), get_world_size()

    @property
    def bar_interval(self) -> float:
        """Seconds between updates of a progress bar: few lines where it goes into a file."""
        return 0.1 if sys.stderr.isatty() else 10.0

    def share(self, work: Sequence[T]) -> list[T]:
        """Return this rank's part of some work, every n-th piece of it.

        All ranks must pass the same; see :meth:`first`.
        """
        return list(work[self.rank :: self.size])

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def first(self, value=None):
        """Return what rank 0 passed, on all ranks."""
        if self.size == 1:
            return value
        holder = [value]
        torch.distributed.broadcast_object_list(holder, src=0)
        return holder[0]

    def check_shared(self, folder: Path) -> None:
        """Check that all ranks see one folder.

        Raises:
            ToMeError: This rank does not see what rank 0 wrote there.
        """
        if self.size == 1:
            return
        name = self.first(f".shared-{uuid.uuid4().hex}")
        path = Path(folder) / name
        if self.rank == 0:
            path.touch()
        self.wait()
        until = time.monotonic() + SHOW_UP_SECONDS
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.2)
        seen = path.exists()
        self.wait()
        if self.rank == 0:
            path.unlink(missing_ok=True)
        if not seen:
            raise ToMeError(
                f"rank {self.rank} does not see what rank 0 wrote to {folder}; --out must be a "
                "folder on a file system that all machines share"
            )

    def close(self) -> None:
        """Leave the group of processes."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
