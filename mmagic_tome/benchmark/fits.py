# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Whether a network fits into the memory that is free, asked before it is built."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ToMeError
from .kinds import Shape
from .targets import on_meta


def available_memory(device: str) -> int:
    """Bytes that can still be taken on a device.

    On a CPU what Linux calls available, or what is left to the control group if that is less;
    where neither is known, a number beyond any machine.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = [2**63]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found.append(sizes["MemAvailable"] * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found)


def needed_memory(
    shape: Shape, size: tuple[int, int], batch: int, dtype: torch.dtype, written_out: bool = False
) -> tuple[int, int]:
    """Bytes of the weights (exact) and of a forward on top of them (an estimate).

    Args:
        shape (Shape): what is to be built.
        size (tuple): (height, width) in pixels.
        batch (int): batch of the network.
        dtype (torch.dtype): of weights and activations.
        written_out (bool): whether attention holds the scores of all pairs.
    """
    network = on_meta(shape)
    count = sum(t.numel() for t in (*network.parameters(), *network.buffers()))
    return count * dtype.itemsize, shape.activations(size, batch, written_out) * dtype.itemsize


def check_fits(
    name: str,
    shape: Shape,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    device: str,
    written_out: bool = False,
) -> None:
    """Raise :class:`ToMeError` if a network cannot fit; says what would.

    Args: as :func:`needed_memory`; ``name`` is the target's, for the message.
    """
    weights, forward = needed_memory(shape, size, batch, dtype, written_out)
    free = available_memory(device)
    if weights + forward <= free:
        return
    ways = []
    if dtype.itemsize > 2:
        half = sum(needed_memory(shape, size, batch, torch.bfloat16, written_out))
        if half <= free:
            ways.append(f"--dtype bf16 (about {half / 2**30:.1f} GiB)")
    if batch > 1:
        ways.append("a smaller --batch")
    ways.append("a smaller --size or target")
    raise ToMeError(
        f"{name} at {size[0]}x{size[1]}, batch {batch}, needs about "
        f"{(weights + forward) / 2**30:.1f} GiB ({weights / 2**30:.1f} of weights) and {device} "
        f"has {free / 2**30:.1f} GiB free; write {' or '.join(ways)}"
    )
