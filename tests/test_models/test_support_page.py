# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest

pytest.importorskip("mmagic")  # whose configs one table goes through
pytest.importorskip("mmpretrain")  # of which one lists models

from support_table import TABLES, updated


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.name)
def test_the_tables_are_those_of_the_tests(file, no_default_scope):
    text = file.read_text(encoding="utf-8")
    assert text == updated(file), "out of date: run python tests/support_table.py"
