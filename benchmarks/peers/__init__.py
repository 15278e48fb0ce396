# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching by other authors, one file per paper, written from the papers' formulas.

Methods to compare with, not part of the package. ``method(...)`` of each file returns a
:class:`mmagic_tome.lab.methods.Method`. Where a paper leaves a detail open, the docstring says "our
reading".
"""
