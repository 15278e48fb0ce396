# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
from support_table import PAGE, split, table


def test_the_table_of_the_page_is_that_of_the_tests():
    _, inside, _ = split(PAGE.read_text(encoding="utf-8"))
    assert inside == table(), "out of date: run python tests/support_table.py"
