# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch


@pytest.fixture(autouse=True)
def _outside_of_mmagic_and_without_gradients(no_default_scope):
    """Vision transformers are built outside of MMagic's scope."""
    with torch.no_grad():
        yield
