# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``python -m mmagic_tome VERB``: the commands, also of an installed wheel."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmagic_tome.lab.cli import VERBS
from mmagic_tome.lab.cli import main as lab_main

# Verb -> what it does: those of MMagic's runner.
_RUNNER_VERBS = {
    "test": "MMagic's tools/test.py: the test loop of a config",
    "train": "MMagic's tools/train.py: the training of a config",
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a verb; return its exit code (2 for an unknown one).

    Args:
        argv: The verb and its options. Default: those of the process.
        prog: Name shown in help and errors. Default: ``mmagic_tome VERB``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        verbs = {**VERBS, **_RUNNER_VERBS}
        print(f"usage: python -m mmagic_tome {'|'.join(verbs)} [options]\n")
        print(*(f"  {name:10} {about}" for name, about in verbs.items()), sep="\n")
        print("\nVERB --help explains the options of each.")
        return 0
    if argv and argv[0] in _RUNNER_VERBS:
        from mmagic_tome.mmagic import entry

        run = getattr(entry, f"{argv[0]}_main")
        return run(argv[1:], prog or f"mmagic_tome {argv[0]}")
    if not argv or argv[0] not in VERBS:
        wrong = f"there is no verb {argv[0]!r}" if argv else "state a verb"
        known = ", ".join(verb for verb in (*VERBS, *_RUNNER_VERBS) if verb != "tune")
        print(f"{prog or 'mmagic_tome'}: error: {wrong}; write one of {known}", file=sys.stderr)
        return 2
    return lab_main(argv, prog)


if __name__ == "__main__":
    sys.exit(main())
