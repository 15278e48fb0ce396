# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Tiny weights for MMagic's configs, and models that are made of both."""

import pytest


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """See ``mmagic_hub.write_hub``."""
    import mmagic_hub

    return mmagic_hub.write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def build(hub):
    """(config) -> model with random weights everywhere, as MMagic's ``init_model`` builds it."""
    import tiny
    from mmagic.apis import init_model

    return lambda config: tiny.randomise(init_model(config, device="cpu"))
