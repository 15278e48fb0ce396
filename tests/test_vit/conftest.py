# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers are built outside of MMagic's scope."""

import pytest


@pytest.fixture(autouse=True)
def _outside_of_mmagic(no_default_scope):
    pass
