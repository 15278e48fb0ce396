# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic 1.2.0 on current numpy, torch, torchvision, diffusers, transformers, mmcv-lite.

``import mmagic_tome`` calls :func:`apply`, and from then on ``import mmagic.apis`` works. A patch
acts when the module that needs it is imported, only where its symptom occurs, and most are gone
again when that import is done. They are listed by::

    python -c "import mmagic_tome; print(mmagic_tome.compat.report())"

===============  ========================================================
libraries.py     patches of libraries that MMagic imports
mmagic.py        patches of MMagic's own classes
base.py          what a patch is, and what several of them need
import_hooks.py  acting around the import of a module
===============  ========================================================
"""

import contextlib
import functools
import importlib
import sys
import warnings

from . import libraries, mmagic  # noqa: F401  (they declare their patches)
from .base import PATCHES, is_installed
from .import_hooks import around_import, when_imported

__all__ = ["apply", "around_import", "report", "when_imported"]

# Name of a patch -> what became of it: 'applied'; 'not needed', the symptom is absent;
# 'not installed', the library is absent; 'waiting' for an import; 'failed: ' and the error.
_STATUS = {}


def apply():
    """Make MMagic importable; calling it again does nothing.

    Imports nothing itself. A module that was imported earlier gets the patches that still make
    sense for it at once.
    """
    for patch in PATCHES:
        if patch.__name__ in _STATUS:
            continue
        _STATUS[patch.__name__] = "waiting"
        if sys.modules.get(patch.module) is None:  # None blocks an import
            around_import(patch.module, functools.partial(_applying, patch))
        elif patch.lasting:
            with _applying(patch):
                pass
        else:
            _STATUS[patch.__name__] = "not needed"


def report():
    """A table (str) of all patches: what became of each, its name, and the error that a user meets
    without it. Imports what is not imported yet, which takes some seconds."""
    apply()
    for patch in PATCHES:
        if _STATUS[patch.__name__] != "waiting":
            continue
        if not is_installed(patch.module.partition(".")[0]):
            _STATUS[patch.__name__] = "not installed"
            continue
        try:
            importlib.import_module(patch.module)
        except Exception as error:
            _STATUS[patch.__name__] = f"failed: {type(error).__name__}: {error}"
    widths = [max(map(len, column)) for column in (_STATUS.values(), _STATUS)]
    return "\n".join(
        f"{_STATUS[patch.__name__]:<{widths[0]}}  {patch.__name__:<{widths[1]}}  {patch.symptom}"
        for patch in PATCHES
    )


@contextlib.contextmanager
def _applying(patch):
    """Run a patch around an import and note what came of it."""
    around = patch()
    try:
        if _advance(patch, around):
            _STATUS[patch.__name__] = "applied"
        elif _STATUS[patch.__name__] == "waiting":
            _STATUS[patch.__name__] = "not needed"
        yield
        _advance(patch, around)
    finally:
        around.close()


def _advance(patch, around):
    """Run the next part of a patch; return whether there is another. An error is a warning: the
    import may well succeed without the patch."""
    try:
        return next(around, "ended") is None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        _STATUS[patch.__name__] = f"failed: {reason}"
        warnings.warn(
            f"mmagic_tome.compat: {patch.__name__!r} of {patch.module} failed ({reason})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
