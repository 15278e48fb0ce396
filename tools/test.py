# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's tools/test.py with this package's patches; see mmagic_tome/mmagic/entry.py.

    python tools/test.py configs/demo/sd-emoji_eval.py [CHECKPOINT] --out metrics.json

The same as ``python -m mmagic_tome test``.
"""

import sys
from pathlib import Path

# A checkout runs its own package, and no name in this folder hides an installed module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmagic_tome.mmagic.entry import test_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(test_main())
