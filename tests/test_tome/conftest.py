# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A network with three levels, and what its modules receive."""

import pytest
from tiny import tiny_unet


@pytest.fixture
def unet():
    return tiny_unet(levels=3)


@pytest.fixture
def tokens_into():
    """(network, *suffixes) -> suffix -> numbers of tokens that modules with such names receive."""

    def watch(network, *suffixes):
        seen = {suffix: [] for suffix in suffixes}
        for name, module in network.named_modules():
            for notes in [seen[suffix] for suffix in suffixes if name.endswith(suffix)]:
                module.register_forward_pre_hook(_note(notes))
        return seen

    return watch


def _note(notes):
    return lambda module, args: notes.append(args[0].shape[1])
