# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic 1.2.0 on current numpy, torch, torchvision, diffusers, transformers, mmcv-lite.

``import mmagic_tome`` calls :func:`apply`, and from then on ``import mmagic.apis``
works. A repair acts when the module it cures is imported, after looking for the
symptom itself rather than for a version, and most are gone again when that import
is done; where nothing is broken, nothing is touched. :func:`report` lists them::

    python -c "import mmagic_tome; print(mmagic_tome.compat.report())"
"""

import contextlib
import importlib
import sys
import warnings
from dataclasses import dataclass, replace
from typing import Optional

from . import repairs as _repairs
from .watch import around_import, when_imported

__all__ = ["Entry", "Report", "apply", "around_import", "report", "when_imported"]


@dataclass(frozen=True)
class Entry:
    """What became of one repair.

    Attributes:
        name (str): Name of the function in ``mmagic_tome/mmagic/compat/repairs``.
        symptom (str): What a user without the repair meets.
        status (str): ``'applied'``; ``'not needed'``, the symptom is absent;
            ``'not installed'``, what it would cure is absent; ``'waiting'`` for the
            import of ``module``; ``'failed'``, see ``detail``.
        module (str): The module whose import is cured.
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
        width = max((len(entry.status) for entry in self), default=0)
        name = max((len(entry.name) for entry in self), default=0)
        return "\n".join(
            f"{entry.status:<{width}}  {entry.name:<{name}}  {entry.detail or entry.symptom}"
            for entry in self
        )


_ENTRIES = {}  # name -> Entry, in the order of the repairs


def apply():
    """Make MMagic importable; calling it again does nothing.

    Imports nothing itself. A module that was imported earlier gets the repairs that
    still make sense for it at once, the others when they are imported.
    """
    for repair in _repairs.REPAIRS:
        if repair.__name__ in _ENTRIES:
            continue
        _ENTRIES[repair.__name__] = Entry(repair.__name__, repair.symptom, "waiting", repair.module)
        if repair.module not in sys.modules:
            around_import(repair.module, _Applying(repair))
        elif repair.lasting:
            with _Applying(repair)():
                pass
        else:
            _note(repair, "not needed")


def report(probe=True):
    """What was repaired.

    Args:
        probe (bool): Import what no one has imported yet, so that every answer is
            final (some seconds). With False, repairs whose module was not imported
            are ``'waiting'``. Default: True.

    Returns:
        Report: A list of :class:`Entry`; ``str()`` of it is a table.
    """
    apply()
    for repair in _repairs.REPAIRS if probe else ():
        if _ENTRIES[repair.__name__].status == "waiting":
            _probe(repair)
    return Report(_ENTRIES.values())


def _probe(repair):
    if not _repairs.is_installed(repair.module.partition(".")[0]):
        return _note(repair, "not installed")
    try:
        importlib.import_module(repair.module)
    except ModuleNotFoundError as error:
        if error.name == repair.module:  # a version of the package without that module
            return _note(repair, "not needed")
        _note(repair, "failed", error)
    except Exception as error:
        _note(repair, "failed", error)


def _note(repair, status, error=None):
    detail = error and f"{type(error).__name__}: {error}"
    _ENTRIES[repair.__name__] = replace(
        _ENTRIES[repair.__name__], status=status, detail=detail or None
    )


class _Applying:
    """Runs a repair around an import and notes what came of it."""

    def __init__(self, repair):
        self.repair = repair

    @contextlib.contextmanager
    def __call__(self):
        around = self.repair()
        try:
            next(around)
            _note(self.repair, "applied")
        except StopIteration:
            # Unless it was, at an earlier import that failed for another reason.
            if _ENTRIES[self.repair.__name__].status != "applied":
                _note(self.repair, "not needed")
        except Exception as error:
            self._failed(error)
        try:
            yield
        except BaseException:
            around.close()
            raise
        try:
            next(around, None)
        except Exception as error:
            self._failed(error)

    def _failed(self, error):
        # The import may well succeed without it, so it is not for us to stop it.
        _note(self.repair, "failed", error)
        warnings.warn(
            f"mmagic_tome.compat: {self.repair.__name__!r} of {self.repair.module} failed "
            f"({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )
