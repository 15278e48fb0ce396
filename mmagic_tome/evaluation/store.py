# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The folder of an evaluation: what was made already, and whether it may be gone on with.

::

    manifest.json                      what the pictures depend on (the fingerprint)
    pictures/<contender>/000012.png    a picture
    pictures/<contender>/000012.npz    its final latents
    pictures/<contender>/000012.json   its record, written last: a picture without one is
                                       no picture yet
    measures/<metric>/<contender>/000000.npz    a metric over a chunk of pictures
    cost.json                          times and memory, with all raw figures

Every file is written under a temporary name and renamed. So a process that is killed leaves
whole files, and the next one goes on from them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..apis.pictures import ResultFolder
from ..errors import ToMeError
from .contenders import slug

FORMAT = 1
PARTS = ("pictures", "measures")
FILES = (
    "manifest.json",
    "threads.json",
    "cost.json",
    "results.json",
    "results.csv",
    "pictures.csv",
)
REPORTS = ("table.md", "report.html")


@contextmanager
def readable_io_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into one clear line.

    Raises:
        ToMeError: For a full disk, a quota, or a folder that may not be written to. What
            has its final name is whole; the same command goes on from there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise ToMeError(
                f"cannot write to {folder}: {error.strerror}. Everything that has its final name "
                "there is whole; make room and run the same command again to go on"
            ) from error
        raise


class RunFolder:
    """The folder of one evaluation.

    Args:
        path: The folder; made when something is written.
    """

    def __init__(self, path) -> None:
        self.path = Path(path)

    # --- one process at a time ----------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: two commands that write to it at once would time each other.

        Raises:
            ToMeError: Another process holds it, or nothing can be written there.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            yield
            return
        with readable_io_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a")  # noqa: SIM115
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ToMeError(
                    f"another evaluation is running in {self.path}; wait for it, or write to "
                    "another folder with --out"
                ) from None
            yield

    # --- manifest -----------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None in a new folder.

        Raises:
            ToMeError: It is there and cannot be read.
        """
        path = self.path / "manifest.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ToMeError(f"cannot read {path}: {error}; use --overwrite or --out") from None

    def open(self, fingerprint: dict, contenders: dict[str, dict], overwrite: bool) -> dict:
        """Begin or go on with an evaluation.

        Contenders may be added to a folder; those that it has must be the same.

        Args:
            fingerprint: What all pictures depend on, JSON-able.
            contenders: Name of each contender to what its pictures depend on besides.
            overwrite: Begin anew where the folder holds something else; if only some contenders
                are others than they were, those alone.

        Returns:
            The manifest, which may hold contenders that are not asked for now.

        Raises:
            ToMeError: The folder holds another evaluation; says what differs.
        """
        fingerprint, contenders = _plain(fingerprint), _plain(contenders)
        held = self.manifest()
        if held is None and self._holds_parts() and not overwrite:
            raise ToMeError(
                f"{self.path} holds pictures but no manifest; use --overwrite to begin anew, or "
                "another folder with --out"
            )
        changed = differences(held, fingerprint, contenders)
        if changed and not overwrite:
            raise ToMeError(
                f"{self.path} holds another evaluation, which differs in {'; '.join(changed)}. "
                "Use --overwrite to replace it, or another folder with --out"
            )
        if changed and not differences(held, fingerprint, {}):
            for name, spec in contenders.items():
                if held["contenders"].get(name, spec) != spec:
                    shutil.rmtree(self.path / "pictures" / slug(name), ignore_errors=True)
        elif changed or (held is None and self._holds_parts()):
            self.clear()
            held = None
        manifest = held or {"format": FORMAT, "fingerprint": fingerprint, "contenders": {}}
        manifest["contenders"].update(contenders)
        with readable_io_errors(self.path):
            self._files().save_json("manifest.json", manifest)
        return manifest

    def clear(self) -> None:
        """Remove what an evaluation wrote, and nothing else."""
        for part in PARTS:
            shutil.rmtree(self.path / part, ignore_errors=True)
        for name in (*FILES, *REPORTS):
            (self.path / name).unlink(missing_ok=True)

    def _holds_parts(self) -> bool:
        return any((self.path / part).is_dir() for part in PARTS)

    def _files(self, *below: str) -> ResultFolder:
        return ResultFolder(self.path.joinpath(*below))

    # --- pictures -----------------------------------------------------------------------------

    def has_picture(self, contender: str, number: int) -> bool:
        """Whether a picture was made and committed."""
        folder = self.path / "pictures" / contender
        return all((folder / f"{number:06d}{kind}").is_file() for kind in (".json", ".png"))

    def save_picture(self, contender, number, image, latents, record, text) -> None:
        """Commit a picture: what has no record after this was not made.

        Args:
            contender: Name of its folder.
            number: Of the picture, from 0.
            image: PIL image.
            latents: Its final latents as an array (C, h, w), or None.
            record: What to remember of it; its digest is added.
            text: Text chunks of the PNG.

        Raises:
            ToMeError: The disk is full; nothing of this picture counts then.
        """
        files, stem = self._files("pictures", contender), f"{number:06d}"
        with readable_io_errors(self.path):
            files.save_png(f"{stem}.png", image, text)
            if latents is not None:
                with files.new_file(f"{stem}.npz") as path, open(path, "wb") as file:
                    np.savez_compressed(file, latents=latents)
            files.save_json(f"{stem}.json", {**record, "sha256": picture_digest(image)})

    def record(self, contender: str, number: int) -> dict[str, Any]:
        """Return the record of a committed picture."""
        path = self.path / "pictures" / contender / f"{number:06d}.json"
        return json.loads(path.read_text(encoding="utf-8"))

    def picture(self, contender: str, number: int) -> Image.Image:
        """Return a committed picture.

        Raises:
            ToMeError: It cannot be read, or is not the one that was committed.
        """
        path = self.path / "pictures" / contender / f"{number:06d}.png"
        try:
            image = Image.open(path).convert("RGB")
            same = picture_digest(image) == self.record(contender, number)["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise ToMeError(f"cannot read {path}: {error}; remove it and run again") from None
        if not same:
            raise ToMeError(f"{path} was changed since it was made; remove it and run again")
        return image

    def latents(self, contender: str, number: int) -> np.ndarray | None:
        """Return the final latents (C, h, w) of a committed picture, None if there are none."""
        path = self.path / "pictures" / contender / f"{number:06d}.npz"
        try:
            with np.load(path) as arrays:
                return arrays["latents"]
        except FileNotFoundError:
            return None

    def adopt_dense(self, other: RunFolder, fingerprint: dict, spec: dict, numbers) -> int:
        """Take the dense pictures of another evaluation instead of making them again.

        Args:
            other: Its folder.
            fingerprint: What all pictures of this evaluation depend on.
            spec: What dense ones depend on besides.
            numbers: Numbers of the pictures to take.

        Returns:
            How many were taken; those that were here are not counted.

        Raises:
            ToMeError: It is no evaluation, or its dense pictures are not the same; says
                what differs.
        """
        held = other.manifest()
        if held is None:
            raise ToMeError(f"{other.path} holds no evaluation (it has no manifest.json)")
        changed = differences(held, _plain(fingerprint), {"dense": _plain(spec)})
        if changed:
            raise ToMeError(
                f"the dense pictures of {other.path} do not fit: they differ in "
                f"{'; '.join(changed)}"
            )
        taken = 0
        for number in numbers:
            if self.has_picture("dense", number) or not other.has_picture("dense", number):
                continue
            other.picture("dense", number)  # checks that it is what was committed
            for kind in (".png", ".npz", ".json"):  # the record last
                name = f"{number:06d}{kind}"
                source = other.path / "pictures" / "dense" / name
                with readable_io_errors(self.path):
                    if source.is_file():
                        with self._files("pictures", "dense").new_file(name) as path:
                            shutil.copyfile(source, path)
            taken += 1
        return taken

    # --- measures -----------------------------------------------------------------------------

    def measure(self, metric: str, contender: str, chunk: int, key: str) -> dict | None:
        """Return the arrays of a metric over a chunk, or None if they are not there.

        Args:
            metric: Name of the metric.
            contender: Name of its folder.
            chunk: Number of the chunk.
            key: Of what it was computed from; another one means that it is not there.
        """
        path = self.path / "measures" / metric / contender / f"{chunk:06d}.npz"
        try:
            with np.load(path) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError):
            return None
        return found if str(found.pop("key", "")) == key else None

    def save_measure(self, metric: str, contender: str, chunk: int, key: str, arrays) -> None:
        """Commit the arrays of a metric over a chunk (see :meth:`measure`)."""
        files = self._files("measures", metric, contender)
        with (
            readable_io_errors(self.path),
            files.new_file(f"{chunk:06d}.npz") as path,
            open(path, "wb") as file,
        ):
            np.savez_compressed(file, key=np.array(key), **arrays)

    # --- other files --------------------------------------------------------------------------

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file of the folder, None if it is not there."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_json(self, name: str, value: Any) -> None:
        """Commit a JSON file; NaN and infinities are errors."""
        with readable_io_errors(self.path):
            self._files().save_json(name, value)

    def save_text(self, name: str, text: str) -> None:
        """Commit a UTF-8 text file."""
        with readable_io_errors(self.path), self._files().new_file(name) as path:
            path.write_text(text, encoding="utf-8")


def differences(held: dict | None, fingerprint: dict, contenders: dict[str, dict]) -> list[str]:
    """Return what a manifest has otherwise, one ``key: theirs, now ours`` each."""
    if held is None:
        return []
    if held.get("format") != FORMAT:
        return [f"format: {held.get('format')!r}, now {FORMAT}"]
    fingerprint, contenders = _plain(fingerprint), _plain(contenders)
    changed = _compare(held["fingerprint"], fingerprint, "")
    for name, spec in contenders.items():
        if name in held["contenders"]:
            changed += _compare(held["contenders"][name], spec, f"{name}.")
    return changed


def _compare(old: dict, new: dict, prefix: str) -> list[str]:
    changed = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _compare(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}: {_short(a)}, now {_short(b)}")
    return changed


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON: tuples are lists there."""
    return json.loads(json.dumps(value))


def picture_digest(image: Image.Image) -> str:
    """Return a hash of the pixels of a picture."""
    pixels = np.asarray(image.convert("RGB"))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk that a folder is on, or would be on, in bytes."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
