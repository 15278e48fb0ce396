# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pages are short and use the field's words."""

import re

import pytest
from pages import pages, prose_of, text_of, without_code

# A page has one purpose.
MOST_WORDS = 1200
# Old names of things, which readers cannot search for, and turns that are none.
PRIVATE = (
    r"foret(?:ell|old)\w*|contenders?|repa(?:y|id)\w*|unpaid|unbeaten|bears merging|by work|"
    r"(?:near|nearer|closer) to dense|in turn|stands? for|stands in|says how|knows nothing of|"
    r"wins over|put back|of ours|of others|nobody|everybody|pictures?|goes on with|hangs on|"
    r"heat map|sites?(?= of merging)|twins|the parabola|on the line|spellings?|is told"
)
CHINESE = r"推得|稠密|快 ?\d+(?:\.\d+)? ?倍"
# The history of names, and a page about a model that others measure.
EXEMPT = {"CHANGELOG.md", "mmagic_tome/assets/demo_model/README.md"}
PAGES = [page for page in pages() if page not in EXEMPT]


def words(text):
    """Number of words; a Chinese character counts as two thirds of one."""
    chinese = len(re.findall(r"[\u4e00-\u9fff]", text))
    return len(re.sub(r"[\u4e00-\u9fff]+", " ", text).split()) + chinese * 2 // 3


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    assert words(prose_of(page)) < MOST_WORDS


@pytest.mark.parametrize("page", ["README.md", "README_zh-CN.md"])
def test_readmes_fit_into_200_lines(page):
    assert len(text_of(page).splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_private_words(page):
    found = re.findall(rf"\b(?:{PRIVATE})\b|{CHINESE}", without_code(prose_of(page)), re.I)
    assert not found


@pytest.mark.parametrize("page", [page for page in PAGES if "zh" in page])
def test_chinese_pages_have_full_width_punctuation(page):
    text = re.sub(r"\]\([^)]*\)", "]", without_code(prose_of(page)))
    assert not re.findall(r"[\u4e00-\u9fff][,;:!?]|[\u4e00-\u9fff]\.(?!\w)", text)
