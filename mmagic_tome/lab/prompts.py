# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Prompts from files and built-in sets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ToMeError
from ..validate import check_integer
from .request import Request, make_request

KEYS = ("prompt", "negative_prompt", "seed")
ASSETS = Path(__file__).resolve().parents[1] / "assets" / "prompts"


@dataclass(frozen=True)
class Prompt:
    """One image to generate."""

    text: str  #: what it should show
    negative: str | None = None  #: what it should not show
    seed: int | None = None  #: in [0, 2**32); None: given by the image's number


def read_prompts(source: str | Path | Sequence[Any]) -> list[Prompt]:
    """The prompts of a file, a built-in set or a list.

    Args:
        source: One of

            - ``'demo'``: 228 of the 360 captions that the demo model was trained on;
            - ``'demo-held-out'``: 561 captions of the same kinds that it was not trained on;
            - a ``.txt`` file: one prompt per line, ``#`` begins a comment;
            - a ``.json`` file: a list of texts or of objects with ``prompt`` and optionally
              ``negative_prompt`` and ``seed``;
            - a ``.csv`` file with a column ``prompt`` and optionally the other two;
            - a list as in a JSON file, or of :class:`Prompt`.

    Raises:
        ToMeError: There is nothing to read, or an entry is wrong; names the file and the entry.
    """
    if source in ("demo", "demo-held-out"):
        source = ASSETS / f"{source.replace('-', '_')}.txt"
    where: Any = "prompts"
    if isinstance(source, (str, Path)):
        where = Path(source).expanduser()
        read = _READERS.get(where.suffix.lower())
        if read is None:
            raise ToMeError(
                f"prompts: {source} is no .txt, .json or .csv file and no built-in set; there are "
                "demo and demo-held-out"
            )
        try:
            source = read(where.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:  # no file, no text, no JSON
            raise ToMeError(f"cannot read prompts from {where}: {error}") from None
    prompts = [_prompt(entry, f"{where}, entry {n}") for n, entry in enumerate(source, start=1)]
    if not prompts:
        raise ToMeError(f"{where} holds no prompts; write at least one")
    return prompts


def _read_txt(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _read_json(text: str) -> list[Any]:
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError(f"write a list of prompts, not of type {type(entries).__name__}")
    return entries


def _read_csv(text: str) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if "prompt" not in (rows.fieldnames or ()):
        raise ValueError(f"no column 'prompt' among {rows.fieldnames}")
    # Other columns may say what they like.
    return [{key: row[key] for key in KEYS if row.get(key)} for row in rows]


_READERS = {".txt": _read_txt, ".json": _read_json, ".csv": _read_csv}


def _prompt(entry: Any, where: str) -> Prompt:
    if isinstance(entry, Prompt):
        return entry
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict) or not set(entry) <= set(KEYS):
        raise ToMeError(f"{where}: write a text or a dict with keys of {KEYS}, got {entry!r}")
    text, negative, seed = (entry.get(key) for key in KEYS)
    if not isinstance(text, str) or not text.strip():
        raise ToMeError(f"{where}: no prompt in {entry!r}")
    if negative is not None and not isinstance(negative, str):
        raise ToMeError(f"{where}: negative_prompt must be a text, got {negative!r}")
    if seed is not None:
        if not str(seed).isdecimal() or int(seed) >= 2**32:
            raise ToMeError(f"{where}: seed must be in [0, 2**32), got {seed!r}")
        seed = int(seed)
    return Prompt(text.strip(), negative, seed)


def spread(prompts: Sequence[Prompt], limit: int | None) -> Sequence[Prompt]:
    """So many of the prompts at most, spread evenly over the list; with None all."""
    count = len(prompts)
    if limit is None or limit >= count:
        return prompts
    return [prompts[place * count // limit] for place in range(limit)]


def request_for(source: Any, prompts: Sequence[Prompt], given: Mapping[str, Any]) -> Request:
    """The request for some prompts.

    Args:
        source: See :func:`~.request.make_request`.
        prompts: Without any those of ``given`` or of the source count.
        given: Other fields of the request. Its seed, or the source's, is that of the first image;
            image i has ``seed + i`` unless its prompt states one. Its negative prompt is that of
            prompts that state none.
    """
    if not prompts:
        return make_request(source, **given)
    usual = {**source.defaults, **{key: one for key, one in given.items() if one is not None}}
    seed, negative = usual.get("seed", 0), usual.get("negative_prompt")
    for key in ("seed", "negative_prompt"):
        if isinstance(usual.get(key), (list, tuple)):
            raise ToMeError(f"{key} is one for all prompts; write others into the prompt file")
    check_integer("", "seed", seed, 0, 2**32 - 1)
    negatives = [negative if one.negative is None else one.negative for one in prompts]
    fields = {
        "prompts": [one.text for one in prompts],
        # Where none is stated none is passed: not all models take one.
        "negative_prompt": [one or "" for one in negatives] if any(negatives) else None,
        "seed": [
            (seed + number) % 2**32 if one.seed is None else one.seed
            for number, one in enumerate(prompts)
        ],
    }
    return make_request(source, **{**given, **fields})
