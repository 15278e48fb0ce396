#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Writes the tables of commands and configs in ``docs/reference``, from parsers and files.

``python docs/_site/generate.py``; a test fails when a page is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmagic_tome.lab.cli import VERBS, build_parser

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("infer", "evaluate", "benchmark", "visualize", "tune")
# Folder of configs -> what it is about.
FOLDERS = {
    "stable_diffusion": "Stable Diffusion 1.5",
    "stable_diffusion_xl": "Stable Diffusion XL",
    "controlnet": "ControlNet",
    "dreambooth": "DreamBooth",
    "textual_inversion": "Textual inversion",
    "vico": "ViCo",
    "fastcomposer": "FastComposer",
    "animatediff": "AnimateDiff",
    "demo": "The demo model",
    "vit": "Vision transformers",
    "video": "Video transformers",
    "benchmarks": "Tables of these pages",
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def commands() -> str:
    """Every option of the commands by group, and which of them take it."""
    # (group, option) -> meaning and commands
    found: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for verb in COMMANDS:
        for group in build_parser(verb)._action_groups:
            for action in group._group_actions:
                if "--help" in action.option_strings:
                    continue
                names = action.option_strings or [action.dest]
                value = action.metavar or "|".join(map(str, action.choices or ()))
                name = f"`{names[0]}{' ' + value if action.option_strings and value else ''}`"
                name = name.replace("|", "\\|")
                title = "of one command" if group.title in COMMANDS else group.title
                options = found.setdefault(title, {})
                key = name if name in options else names[0]
                same = next((one for one in options if one.startswith(f"`{names[0]}")), key)
                text = options.get(same, (action.help, []))
                text[1].append(verb)
                options[same if same in options else name] = text
    parts = []
    for title, options in found.items():
        rows = []
        for name, (text, verbs) in options.items():
            rows.append(
                (name, text.replace("|", "\\|"), "all" if len(verbs) == 5 else ", ".join(verbs))
            )
        parts.append(
            f"### {title[0].upper()}{title[1:]}\n\n"
            + table(("option", "meaning", "commands"), rows)
        )
    return "\n".join(parts)


def verbs() -> str:
    """Every command with what it does and what it runs by default."""
    rows = [
        (f"`{name}`", about, f"`{default}`" if default else "")
        for name, (default, about) in VERBS.items()
    ]
    return table(("command", "what it does", "default config or network"), rows)


def described(path: Path) -> str:
    """The first sentence of a config's leading comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#   "):
            break
        lines.append(line.lstrip("# "))
    text = " ".join(lines)
    return re.split(r"(?<=\w[.:]) |:$|\.$", text)[0].rstrip(".:")


def configs() -> str:
    """Every config by folder."""
    parts = []
    for folder, title in FOLDERS.items():
        rows = [
            (f"[{path.stem}](../../configs/{folder}/{path.name})", described(path))
            for path in sorted((ROOT / "configs" / folder).glob("*.py"))
        ]
        parts.append(
            f"### {title}\n\n[Use and operations](../../configs/{folder}/README.md)\n\n"
            + table(("config", ""), rows)
        )
    return "\n".join(parts)


PAGES = {
    "docs/reference/commands.md": {"verbs": verbs, "options": commands},
    "docs/reference/configs.md": {"configs": configs},
}


def updated(page: str) -> str:
    """The text of a page with its tables made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = before + begin + make() + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(updated(name), encoding="utf-8")
