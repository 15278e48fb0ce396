# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How the scripts beside this file start: a checkout runs without being installed."""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def start(command):
    """Run a command of the package; return its exit code.

    Args:
        command: one of ``mmagic_tome.__main__.COMMANDS``, the script's name without ``.py``.
    """
    if (CHECKOUT / "mmagic_tome").is_dir():
        # A checkout runs its own package, not another version that may be installed.
        sys.path.insert(0, str(CHECKOUT))
    try:
        from mmagic_tome.__main__ import run_command
    except KeyboardInterrupt:  # where MMagic is installed, this import takes seconds
        print(f"{command}.py: interrupted", file=sys.stderr)
        return 130
    return run_command(command, None, f"{command}.py")
