# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``python -m mmagic_tome COMMAND``: the commands, also from an installed wheel."""

import sys

from mmagic_tome.apis import cli

USAGE = """\
usage: python -m mmagic_tome infer|evaluate [CONFIG] [options]

  infer     generate images from text, dense and merged (infer --help)
  evaluate  compare dense, merged and fewer steps: metrics, cost, a report (evaluate --help)
"""


def main(argv=None):
    """Run a command; return its exit code (2 for an unknown one)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "infer":
        return cli.main(argv[1:], prog="mmagic_tome infer")
    if argv and argv[0] == "evaluate":
        from mmagic_tome.evaluation import cli as evaluate

        return evaluate.main(argv[1:], prog="mmagic_tome evaluate")
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    found = f"unknown command {argv[0]!r}" if argv else "no command"
    print(f"mmagic_tome: error: {found}; there are: infer, evaluate", file=sys.stderr)
    return cli.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
