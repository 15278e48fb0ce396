# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Calling a command as the shell does."""

import pytest


@pytest.fixture
def call_command(capfd):
    """Call a command's ``main``; return its exit code, what it printed, and its complaints."""

    def call(main, *argv):
        code = main([str(arg) for arg in argv])
        out, err = capfd.readouterr()
        return code, out, err

    return call
