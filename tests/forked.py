# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Work in a process of its own that starts as a copy of this one: a new Python would take up to ten
seconds to import MMagic."""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest


def start(work, output):
    """Run ``work()`` in a forked process; return its id, for :func:`status`.

    Args:
        work (callable): what it returns is the exit code if it is a whole number, else 0; 1 after
            an exception.
        output (Path): file for what the process prints, and the traceback if it fails.
    """
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(output, "w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            # Pytest's own lead elsewhere.
            sys.stdout = sys.stderr = file
            try:
                returned = work()
                code = returned if isinstance(returned, int) else 0
            except BaseException:
                traceback.print_exc(file=file)
    finally:
        # Not by way of pytest, which would go on with the other tests here.
        os._exit(code)


def status(child, output, seconds=300):
    """Wait for a process of :func:`start`; return its exit code, or minus the signal's number."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, how = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(how)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"not done after {seconds} s: {Path(output).read_text()[-3000:]}")


def free_port():
    """A port of this machine that nobody listens at, as a string."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
