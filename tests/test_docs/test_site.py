# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The pages link to what is there, all can be reached, and the site builds without a warning."""

import os
import re
import subprocess
import sys

import pytest
from pages import ROOT, anchors_of, links_of, pages, text_of

PAGES = pages()
# Parts of pages that are no pages of their own.
STARTS = ("README.md", "docs/index.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, fragment in links_of(page):
        assert (ROOT / target).exists(), f"{page}: there is no {target}"
        if fragment and target.endswith(".md"):
            assert fragment in anchors_of(target), f"{page}: there is no #{fragment} in {target}"


def test_every_page_can_be_reached():
    found, waiting = set(), list(STARTS)
    while waiting:
        page = waiting.pop()
        if (ROOT / page).is_dir():
            page = f"{page}/README.md"
        if page in found or page not in PAGES:
            continue
        found.add(page)
        waiting += [target for target, _ in links_of(page)]
    assert set(PAGES) - found == set()


def test_every_image_is_shown():
    shown = {target for page in PAGES for target, _ in links_of(page)}
    images = {str(path.relative_to(ROOT)) for path in (ROOT / "docs/images").rglob("*.png")}
    assert images and images <= shown


def test_pages_that_code_and_messages_name_are_there():
    named = set()
    for folder in (
        "mmagic_tome",
        "tests",
        "configs",
        "benchmarks",
        "examples",
        "tools",
        "requirements",
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".txt", ".yml"):
                found = re.findall(r"\bdocs/[\w/-]+\.\w+", path.read_text(encoding="utf-8"))
                named |= {(path, name) for name in found}
    missing = [(str(path), name) for path, name in named if not (ROOT / name).exists()]
    assert named and not missing


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    for page in PAGES:
        if page.startswith("docs/"):
            html = (tmp_path / "site" / page[5:]).with_suffix(".html")
            assert html.is_file(), page
    assert "mmagic_tome" in text_of("README.md")
