# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How the scripts beside this file start: a checkout runs without being installed."""

import sys
from pathlib import Path

# A checkout runs its own package, and no name in this folder hides an installed module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmagic_tome.__main__ import main  # noqa: E402


def start(verb: str) -> None:
    """Run a verb of ``python -m mmagic_tome`` with the arguments of the process, and exit."""
    sys.exit(main([verb, *sys.argv[1:]], prog=f"{verb}.py"))
