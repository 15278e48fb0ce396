# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The folder of a run: what it is of, what was found, and its images.

::

    work_dir/20260131_120000/
        manifest.json                     what everything in the folder depends on
        rows.jsonl                        one row per result, appended
        rows.1.jsonl                      those of rank 1, if there are several processes
        images/<method>/000012.png        image 12 of a method
        images/<method>/000012.pt         its final latents

A process that is killed leaves whole rows and whole images. The next one, with ``--resume``, reads
the rows and does what is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
from mmengine.dist import broadcast_object_list, get_rank

from ..errors import ToMeError
from .files import users_errors, write_text

FORMAT = 2
# What may be added to a run; of the rest of the manifest nothing may change.
_GROWING = ("methods", "metrics")


def new_folder(work_dir: str | os.PathLike, resume: str = "") -> Path:
    """The folder for a run below ``work_dir``, named by the time as mmengine does it; the same on
    all ranks. The first file makes it. With ``resume``, a command, it is the newest of that one.

    Raises:
        ToMeError: There is none to go on with; nothing can be written there.
    """
    found: list[Any] = [None]
    if get_rank() == 0:
        found = [_newest(Path(work_dir), resume) if resume else _make(Path(work_dir))]
    broadcast_object_list(found)
    return found[0]


def _newest(work_dir: Path, command: str) -> Path:
    runs = [RunFolder(path.parent) for path in work_dir.glob("*/manifest.json")]
    names = [run.path.name for run in runs if run.manifest.get("command") == command]
    if not names:
        raise ToMeError(f"--resume: no run in {work_dir} to go on with; leave out --resume")
    return work_dir / max(names)


def _make(work_dir: Path) -> Path:
    there = next(path for path in (work_dir, *work_dir.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ToMeError(f"cannot write to {there}; choose another --work-dir")
    path = work_dir / time.strftime("%Y%m%d_%H%M%S")
    number = 0
    while path.exists():  # of a run that began within the same second
        number += 1
        path = path.with_name(f"{path.name[:15]}_{number}")
    return path


class RunFolder:
    """The folder of one run.

    Rows are JSON-able dicts with a ``kind``::

        {'kind': 'image', 'method', 'number', 'prompt', 'negative_prompt', 'seed', 'finite', 'file',
         'strip' and 'frames' of a clip, 'latents', 'predicted_error' or None}
        {'kind': 'metric', 'method', 'metric', 'number', 'value'}    # None: of no finite image
        {'kind': 'metric', 'method', 'metric', 'number': None, 'value', 'others', 'against'}  # sets
        {'kind': 'applied', 'method', 'stats', 'summary'}            # of the first batch
        {'kind': 'round', 'method', 'turn', 'seconds', 'network_seconds', 'images'}
        {'kind': 'memory', 'method', 'run_bytes', 'images'}          # benchmark: 'relative_error'
        {'kind': 'flops', 'method', 'run', 'images'}
        {'kind': 'note', 'text'}

    Seconds, bytes and operations are of a run of so many images; ``network_seconds`` is the part of
    the network's calls.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._rows: list[dict[str, Any]] | None = None
        self._began = False

    @property
    def manifest(self) -> dict[str, Any]:
        """What everything in the folder depends on; empty in a new folder."""
        path = self.path / "manifest.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ToMeError(f"cannot read {path}: {error}; start without --resume") from None

    @contextlib.contextmanager
    def writing(self, manifest: Mapping[str, Any]) -> Iterator[RunFolder]:
        """Begin or go on with a run; no other process but the ranks of this one writes here.

        Args:
            manifest: JSON-able. It must equal that of an earlier run, but for additional names in
                the dicts ``manifest['methods']`` and ``manifest['metrics']``.

        Raises:
            ToMeError: The folder holds another run (says what differs); another process writes
                to it.
        """
        if get_rank() > 0:
            yield self
            return
        with users_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            with lock.acquire(timeout=0):
                self._write_manifest(manifest)
                yield self
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"; --resume goes on with {self.path}") from None
        except filelock.Timeout:
            raise ToMeError(
                f"another process writes to {self.path}; wait for it, or start without --resume"
            ) from None

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        held = self.manifest
        written = json.loads(json.dumps(manifest))
        new = {"format": FORMAT, "methods": {}, "metrics": {}, **written}
        if held:
            both = {key: {**held[key], **new[key]} for key in _GROWING}
            old = {key: {name: both[key][name] for name in held[key]} for key in _GROWING}
            changed = differences(held, {**new, **old})
            if changed:
                raise ToMeError(
                    f"{self.path} holds another run, which differs in {'; '.join(changed)}. "
                    "Ask for the same, or start without --resume"
                )
            new = {**held, **both}
        if new != held:
            text = json.dumps(new, indent=2, ensure_ascii=False)
            write_text(self.path / "manifest.json", text)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows in the order in which they were added, read once, see :meth:`reload`."""
        if self._rows is None:
            paths = sorted(self.path.glob("rows*.jsonl"))
            self._rows = [row for path in paths for row in _read_rows(path)]
        return self._rows

    def reload(self) -> None:
        """Read the rows anew when they are next asked for: other processes may have added some."""
        self._rows = None

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows; they are on the disk when this returns. ToMeError where they cannot be."""
        held, rank = self.rows, get_rank()
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path = self.path / (f"rows.{rank}.jsonl" if rank else "rows.jsonl")
        with users_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._began:
                if path.exists():  # cut what a killed process left of a row
                    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
                self._began = True
            with open(path, "ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        held += map(json.loads, lines)

    def note(self, text: str) -> None:
        """Add a note for the report, once; ranks other than 0 write none."""
        if get_rank() == 0 and not self.has(kind="note", text=text):
            self.add({"kind": "note", "text": text})

    def find(self, **keys: Any) -> list[dict[str, Any]]:
        """The rows that have these values, such as ``find(kind='metric', method='baseline')``."""
        return [
            row for row in self.rows if all(row.get(key) == value for key, value in keys.items())
        ]

    def has(self, **keys: Any) -> bool:
        """Whether any row has these values."""
        return bool(self.find(**keys))


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    # After the last line's end there is nothing, or what a killed process left of a row.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise ToMeError(f"{path}, line {number} is no JSON: {line[:40]!r}; remove it") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two nested dicts have otherwise: one ``key.key: old, now new`` each."""
    found = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            texts = (json.dumps(value, ensure_ascii=False) for value in (before, now))
            short = [text if len(text) <= 60 else f"{text[:57]}..." for text in texts]
            found.append(f"{prefix}{key}: {short[0]}, now {short[1]}")
    return found
