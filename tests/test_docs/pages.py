# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The pages that people read: README, docs, configs, and what they consist of."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\1\2", re.M | re.S)


def pages():
    """Every Markdown file of the repository, sorted."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):  # from an archive
        patterns = ("*.md", "docs/**/*.md", "configs/*/*.md", "benchmarks/*.md")
        listed = [str(path.relative_to(ROOT)) for one in patterns for path in ROOT.glob(one)]
    return sorted(name for name in listed if (ROOT / name).is_file())


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text):
    """The text without its blocks of code and without code within lines."""
    return re.sub(r"`[^`\n]*`", "", _CODE.sub("", text))


def code_of(name, language=None):
    """The blocks of code of a page, of one language or of all."""
    return [code for _, _, kind, code in _CODE.findall(text_of(name)) if language in (None, kind)]


def links_of(name):
    """(path in the repository, fragment) of every link within the repository."""
    found = []
    for link in _LINK.findall(without_code(text_of(name))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = os.path.normpath(Path(name).parent / path) if path else name
        found.append((target, fragment))
    return found


def headings_of(text):
    """(level, title) of every heading."""
    return [
        (len(marks), title)
        for marks, title in re.findall(r"^(#+) (.+)$", _CODE.sub("", text), re.M)
    ]


def anchors_of(name):
    """The fragments that links to a page may have."""
    titles = [
        re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title)
        for _, title in headings_of(text_of(name))
    ]
    generated = set(re.findall(r"^::: (\S+)$", text_of(name), re.M))
    return generated | {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles
    }


def prose_of(name):
    """What is written by hand: no code, no generated figures and tables, no comments."""
    text = re.sub(r"<!-- figure: .*?<!-- /figure -->", "", text_of(name), flags=re.S)
    text = re.sub(r"<!-- (\S+): begin -->.*?<!-- \1: end -->", "", text, flags=re.S)
    return re.sub(r"<!--.*?-->", "", _CODE.sub("", text), flags=re.S)
