# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Hooks of MkDocs: files outside ``docs/`` that pages link to become part of the site.

Pages link to configs, data and sources by relative paths, so the links work in the repository. The
site has what they point at below ``source/``: Markdown files as pages, others as they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS, SOURCE = "docs/", "source/"
# Roles of reStructuredText in docstrings: :class:`~package.Name`.
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?([\w.]+)</code>")
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def linked(page: str, link: str) -> tuple[str, str] | None:
    """What a link of a page points at.

    Args:
        page: The page's path in the repository.
        link: As written.

    Returns:
        The path in the repository and the fragment with its ``#``; for a folder the path of its
        README.md. None for addresses and for places within the page.
    """
    if re.match(r"[a-z]+:|#|/", link):
        return None
    path, mark, fragment = link.partition("#")
    target = os.path.normpath(PurePosixPath(page).parent / path)
    if (ROOT / target).is_dir() and (ROOT / target / "README.md").is_file():
        target = f"{target}/README.md"
    return target, mark + fragment


def site_path(path: str) -> str:
    """A file of the repository -> its path among the site's sources."""
    return path.removeprefix(DOCS) if path.startswith(DOCS) else SOURCE + path


def repository_path(path: str) -> str:
    """The inverse of :func:`site_path`."""
    return path.removeprefix(SOURCE) if path.startswith(SOURCE) else DOCS + path


def outside(pages: list[str]) -> list[str]:
    """Files outside ``docs/`` that pages link to, or that are linked from those."""
    found: dict[str, None] = {}
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        for _, link, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            target = (linked(page, link) or ("", ""))[0]
            if not (ROOT / target).is_file() or target.startswith(DOCS) or target in found:
                continue
            found[target] = None
            waiting += [target] if target.endswith(".md") else []
    return list(found)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside ``docs/``."""
    pages = [repository_path(file.src_uri) for file in files.documentation_pages()]
    for path in outside(pages):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at the site's files; a link to a folder becomes its text."""
    here = page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        found = linked(repository_path(here), match[2])
        if found is None:
            return match[0]
        target, fragment = found
        if (ROOT / target).is_dir():
            return "](#)"
        to = os.path.relpath(site_path(target), PurePosixPath(here).parent)
        return match[1] + PurePosixPath(to).as_posix() + fragment + match[3]

    text = _LINK.sub(replaced, markdown)
    return re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(#\)", r"\1", text)


def on_page_content(html: str, **_: Any) -> str:
    """Show names that docstrings refer to, without the notation of Sphinx."""
    return _ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
