# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A network with three levels."""

import pytest
from tiny import tiny_unet


@pytest.fixture
def unet():
    return tiny_unet(levels=3)
