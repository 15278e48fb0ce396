# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Progress bars of long work."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str = "step", show: bool = True) -> tqdm:
    """A bar on stderr that leaves nothing behind; few lines where stderr is a file.

    Args:
        total: Units of work.
        what: What is being done.
        unit: Name of a unit.
        show: False for none, as on ranks other than 0.
    """
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not show,
    )
