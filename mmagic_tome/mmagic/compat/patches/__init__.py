# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The patches, one function each.

A patch is a generator around the import of one module, like a function for
:func:`contextlib.contextmanager`: what is before ``yield`` runs before the code of that module,
what is after it runs after. A patch that returns without ``yield`` found no symptom and touched
nothing. The first paragraph of its docstring is the symptom as
:func:`mmagic_tome.mmagic.compat.report` prints it.

=============  ==========================================================
libraries.py   of libraries that MMagic imports
mmagic.py      of MMagic's own classes
base.py        what a patch is, and what several of them need
=============  ==========================================================
"""

from . import libraries, mmagic  # noqa: F401  (they declare their patches)
from .base import PATCHES, is_installed, patch_of

__all__ = ["PATCHES", "is_installed", "patch_of"]
