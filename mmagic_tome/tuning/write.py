# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The config that comes out: a base, ``tome_cfg``, ``cache_cfg``, and a comment with what was
measured."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..apis.files import whole_file

# Of a line.
WIDTH = 100


def config_text(
    base: str,
    options: Mapping[str, Any],
    notes: Iterable[str],
    replaces: Iterable[str] = (),
    imports: Iterable[str] | None = None,
    infer: Mapping[str, Any] | None = None,
) -> str:
    """The text of a MMagic config.

    Args:
        base: what its ``_base_`` says.
        options: what :meth:`Setting.coerce` takes.
        notes: paragraphs of the comment at its top.
        replaces: those of ``tome_cfg`` and ``cache_cfg`` that the base has.
        imports: modules that the base imports, if this package is not among them: without it
            these keys are not read.
        infer: steps and the like that were measured and that the base does not say, for its
            ``infer_cfg``.
    """
    lines = []
    for note in notes:
        lines += textwrap.wrap(note, WIDTH - 3, initial_indent="# ", subsequent_indent="# ")
    lines += [f"_base_ = {quoted(base)}", ""]
    if imports is not None:
        names = [*imports, "mmagic_tome"]
        entry = {"imports": names, "allow_failed_imports": False}
        lines.append(f"custom_imports = {python_of(entry)}")
    if infer:
        lines.append(f"infer_cfg = {python_of(infer)}")
    replaced = set(replaces)
    options = dict(options)
    caches = options.pop("cache", None)
    if options:
        # The base's keys would be mixed with these.
        delete = {"_delete_": True} if "tome_cfg" in replaced else {}
        lines += ["tome_cfg = dict(", *_lines({**delete, **options}), ")"]
    elif "tome_cfg" in replaced:
        lines.append("tome_cfg = None")
    if caches is not None:
        lines += ["cache_cfg = [", *(f"    {python_of(cache)}," for cache in caches), "]"]
    elif "cache_cfg" in replaced:
        lines.append("cache_cfg = None")
    return "\n".join(lines) + "\n"


def _lines(options: Mapping[str, Any], depth: int = 1) -> list[str]:
    """A line per entry of a dict; several for one that is too long."""
    lines, indent = [], 4 * depth * " "
    named = all(isinstance(key, str) and key.isidentifier() for key in options)
    for key, value in options.items():
        start = f"{indent}{key}=" if named else f"{indent}{python_of(key)}: "
        line = f"{start}{python_of(value)},"
        if len(line) > WIDTH and isinstance(value, Mapping):
            words = all(isinstance(one, str) and one.isidentifier() for one in value)
            begin, end = ("dict(", "),") if words else ("{", "},")
            lines += [start + begin, *_lines(value, depth + 1), indent + end]
        else:
            lines.append(line)
    return lines


def base_of(config: str, target: str | os.PathLike) -> str:
    """What a config at ``target`` calls the config that was tuned."""
    if "::" in config:
        return config
    source, folder = Path(config).resolve(), Path(target).resolve().parent
    try:
        relative = os.path.relpath(source, folder)
    except ValueError:  # on another drive
        return source.as_posix()
    relative = Path(relative).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def python_of(value: Any) -> str:
    """JSON-able values as one would write them in a config."""
    if isinstance(value, Mapping):
        items = [(key, python_of(one)) for key, one in value.items()]
        if all(isinstance(key, str) and key.isidentifier() for key, _ in items):
            return f"dict({', '.join(f'{key}={one}' for key, one in items)})"
        return "{" + ", ".join(f"{python_of(key)}: {one}" for key, one in items) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(python_of, value))}]"
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(text: str) -> str:
    """A string literal in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
