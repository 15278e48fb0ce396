# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ToMeError


@contextlib.contextmanager
def users_errors(path: Path) -> Iterator[None]:
    """Raise ToMeError in place of the system's error: that the disk is full, or that a folder must
    not be written to."""
    try:
        yield
    except OSError as error:
        raise ToMeError(
            f"cannot write to {path}: {error.strerror or error}. What is there is whole: make "
            "room, or choose another --work-dir, and go on with --resume"
        ) from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, of the same suffix; renamed to ``path`` if all goes well, else removed.

    Raises:
        ToMeError: As :func:`users_errors`.
    """
    path = Path(path)
    # Ranks may write the same file at the same time.
    part = path.with_name(f".{os.getpid()}.{path.name}")
    with users_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; see :func:`whole_file`."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
