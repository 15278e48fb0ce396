# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``python -m mmagic_tome VERB``: the commands, also of an installed wheel."""

import sys

from mmagic_tome.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
