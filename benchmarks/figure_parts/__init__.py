# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What ``figures.py`` puts into the pages, by subject."""
