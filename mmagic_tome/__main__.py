# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``python -m mmagic_tome COMMAND``: the commands, also from an installed wheel."""

from __future__ import annotations

import sys
from importlib import import_module

from mmagic_tome.apis.command_line import BAD_INPUT, INTERRUPTED

# Command -> (module with its ``main(argv, prog)``, what it does).
COMMANDS = {
    "infer": ("apis.cli", "generate images from text, with merging, step caching or neither"),
    "evaluate": (
        "evaluation.cli",
        "compare dense, merged, cached and fewer steps: metrics, cost, a report",
    ),
    "benchmark": ("benchmark.cli", "time and memory of one forward, contenders side by side"),
    "tune": ("tuning.cli", "find the options that reach a speed-up or a PSNR"),
    "visualize": ("visualization.cli", "merge maps, error maps, the cost of each layer"),
}


def run_command(name: str, argv: list[str] | None, prog: str) -> int:
    """Run one of :data:`COMMANDS`; return its exit code.

    Args:
        name: of the command.
        argv: its arguments; those of the process by default.
        prog: name shown in help and complaints.
    """
    try:
        command = import_module(f"mmagic_tome.{COMMANDS[name][0]}")
    except KeyboardInterrupt:  # most of them import torch, which takes seconds
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return command.main(argv, prog=prog)


def usage() -> str:
    """What ``--help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: python -m mmagic_tome {'|'.join(COMMANDS)} [options]",
            "",
            *lines,
            "",
            "COMMAND --help explains each.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit code (2 for an unknown one)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return run_command(argv[0], argv[1:], f"mmagic_tome {argv[0]}")
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    found = f"unknown command {argv[0]!r}" if argv else "no command"
    print(f"mmagic_tome: error: {found}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
