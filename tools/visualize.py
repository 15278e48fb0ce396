# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merge maps, error maps and the cost of each layer, for the model of a MMagic config.

    python tools/visualize.py configs/demo/sd-emoji_tome-5e-1.py --prompt 'red apple' --out maps

See ``mmagic_tome/visualization/`` and ``docs/visualization.md``.
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
        from mmagic_tome.visualization import cli
    except KeyboardInterrupt:  # this import brings torch in, which takes seconds
        print("visualize.py: interrupted", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
