# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Generate images with the model of a MMagic config, with token merging.

    python tools/infer.py configs/demo/sd-emoji_tome-5e-1.py --prompt 'red apple' --compare

The same as ``python -m mmagic_tome infer``; see ``mmagic_tome/apis/cli.py``.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
if (CHECKOUT / "mmagic_tome").is_dir():
    # A checkout runs its own package, not another version that may be installed.
    sys.path.insert(0, str(CHECKOUT))


def main():
    """Run the command; return its exit code."""
    try:
        from mmagic_tome.apis import cli
    except KeyboardInterrupt:  # this import brings torch in, which takes seconds
        print("infer.py: interrupted", file=sys.stderr)
        return 130
    return cli.main(prog="infer.py")


if __name__ == "__main__":
    sys.exit(main())
