# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How often a test's code warns."""

import contextlib
import warnings


@contextlib.contextmanager
def warns_once(words):
    """One warning has these words, however often there is a reason for it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(one.message) for one in caught if words in str(one.message)]
    assert len(found) == 1, [str(one.message) for one in caught]


@contextlib.contextmanager
def silent():
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
