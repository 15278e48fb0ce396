# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pages in English and Chinese say the same: headings, code, numbers, links to one another."""

import re
from collections import Counter

import pytest
from pages import ROOT, code_of, headings_of, links_of, pages, prose_of, text_of, without_code

CHINESE = [page for page in pages() if page.startswith("docs/zh/") or page == "README_zh-CN.md"]
# Folders of which every page is in both languages.
COMPLETE = ("docs/get_started", "docs/howto")


def english(page):
    return "README.md" if page == "README_zh-CN.md" else page.replace("docs/zh/", "docs/")


def code_without_comments(page):
    return [re.sub(r"(^|\s)#\s.*$", "", code, flags=re.M).strip() for code in code_of(page)]


def numbers_of(page):
    """Numbers of the text, without those in addresses of links."""
    text = re.sub(r"\]\([^)\s]*\)", "]", prose_of(page))
    return Counter(re.findall(r"\d+(?:\.\d+)*", text))


def test_what_is_translated():
    expected = {"README.md", "docs/index.md", "docs/project/faq.md"}
    for folder in COMPLETE:
        expected |= {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.md")}
    assert {english(page) for page in CHINESE} == expected


@pytest.mark.parametrize("page", CHINESE)
def test_chinese_pages_are_in_step(page):
    other = english(page)
    levels = [[level for level, _ in headings_of(text_of(one))] for one in (page, other)]
    assert levels[0] == levels[1], "headings"
    assert code_without_comments(page) == code_without_comments(other)
    assert numbers_of(page) == numbers_of(other)
    figures = [
        sorted(
            name.removesuffix("-zh") for name in re.findall(r"<!-- figure: (\S+) -->", text_of(one))
        )
        for one in (page, other)
    ]
    assert set(figures[1]) - set(figures[0]) <= {"matching-sentence"}, "its words are English"
    assert set(figures[0]) <= set(figures[1])


@pytest.mark.parametrize("page", CHINESE)
def test_chinese_pages_link_to_chinese_pages(page):
    for target, _ in links_of(page):
        if (
            target.startswith("docs/")
            and not target.startswith("docs/zh/")
            and target != english(page)
        ):
            there = target.replace("docs/", "docs/zh/", 1)
            assert not (ROOT / there).is_file(), f"{target} is there in Chinese: {there}"


@pytest.mark.parametrize("page", CHINESE)
def test_chinese_pages_are_chinese(page):
    text = re.sub(r"\]\([^)\s]*\)|https?:\S+", "]", without_code(prose_of(page)))
    lines = [line for line in text.splitlines() if len(re.findall(r"[A-Za-z]{3,}", line)) > 12]
    assert all(re.search(r"[\u4e00-\u9fff]", line) for line in lines)
