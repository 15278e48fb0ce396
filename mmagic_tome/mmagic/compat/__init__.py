# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic 1.2.0 on current numpy, torch, torchvision, diffusers, transformers, mmcv-lite.

``import mmagic_tome`` calls :func:`apply`, and from then on ``import mmagic.apis`` works. A patch
acts when the module that needs it is imported, after looking for the symptom itself rather than
for a version, and most are gone again when that import is done; where nothing is broken, nothing
is touched. :func:`report` lists them::

    python -c "import mmagic_tome; print(mmagic_tome.compat.report())"
"""

import contextlib
import functools
import importlib
import sys
import warnings
from dataclasses import dataclass, replace
from typing import Optional

from .import_hooks import around_import, when_imported
from .patches import PATCHES, is_installed

__all__ = ["Entry", "Report", "apply", "around_import", "report", "when_imported"]


@dataclass(frozen=True)
class Entry:
    """What became of one patch.

    Attributes:
        name (str): Name of the function in ``mmagic_tome/mmagic/compat/patches``.
        symptom (str): The error that a user meets without it.
        status (str): ``'applied'``; ``'not needed'``, the symptom is absent; ``'not installed'``,
            the library is absent; ``'waiting'`` for the import of ``module``; ``'failed'``.
        module (str): The module whose import is patched.
        detail (str, optional): The error, if it failed. Default: None.
    """

    name: str
    symptom: str
    status: str
    module: str
    detail: Optional[str] = None


class Report(list):
    """A list of :class:`Entry` that prints as a table."""

    def __str__(self):
        rows = [(entry.status, entry.name, entry.detail or entry.symptom) for entry in self]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join(f"{s:<{widths[0]}}  {n:<{widths[1]}}  {text}" for s, n, text in rows)


_ENTRIES = {}  # name -> Entry, in the order of the patches


def apply():
    """Make MMagic importable; calling it again does nothing.

    Imports nothing itself. A module that was imported earlier gets the patches that still make
    sense for it at once, the others when they are imported.
    """
    for patch in PATCHES:
        if patch.__name__ in _ENTRIES:
            continue
        _ENTRIES[patch.__name__] = Entry(patch.__name__, patch.symptom, "waiting", patch.module)
        if patch.module not in sys.modules:
            around_import(patch.module, functools.partial(_applying, patch))
        elif patch.lasting:
            with _applying(patch):
                pass
        else:
            _note(patch, "not needed")


def report(probe=True):
    """What was patched.

    Args:
        probe (bool): Import what nothing has imported yet, so that every answer is final (some
            seconds). With False, patches whose module was not imported are ``'waiting'``.
            Default: True.

    Returns:
        Report: A list of :class:`Entry`; ``str()`` of it is a table.
    """
    apply()
    for patch in PATCHES if probe else ():
        if _ENTRIES[patch.__name__].status == "waiting":
            _probe(patch)
    return Report(_ENTRIES.values())


def _probe(patch):
    if not is_installed(patch.module.partition(".")[0]):
        return _note(patch, "not installed")
    try:
        importlib.import_module(patch.module)
    except ModuleNotFoundError as error:
        # A version of the package may not have that module.
        missing = error.name == patch.module
        _note(patch, "not needed") if missing else _note(patch, "failed", error)
    except Exception as error:
        _note(patch, "failed", error)


def _note(patch, status, error=None):
    detail = None if error is None else f"{type(error).__name__}: {error}"
    _ENTRIES[patch.__name__] = replace(_ENTRIES[patch.__name__], status=status, detail=detail)


@contextlib.contextmanager
def _applying(patch):
    """Run a patch around an import and note what came of it.

    A patch that fails is a warning: the import may well succeed without it.
    """

    def failed(error):
        _note(patch, "failed", error)
        warnings.warn(
            f"mmagic_tome.compat: {patch.__name__!r} of {patch.module} failed "
            f"({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=4,
        )

    around = patch()
    try:
        next(around)
        _note(patch, "applied")
    except StopIteration:
        # Unless it was, at an earlier import that failed for another reason.
        if _ENTRIES[patch.__name__].status != "applied":
            _note(patch, "not needed")
    except Exception as error:
        failed(error)
    try:
        yield
    except BaseException:
        around.close()
        raise
    try:
        next(around, None)
    except Exception as error:
        failed(error)
