# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging in mmengine's runners: hooks, loops, metrics and a data set of prompts.

=============  ===================================================================
tome.py        ``ToMeHook``: applies, reports, changes the ratio by a schedule
evaluate.py    ``ToMeEvalHook``: dense and merged pictures side by side, and metrics
profile.py     ``ToMeProfileHook``: time and memory per site and step
loops.py       ``ToMeTestLoop``, ``ToMeValLoop``: evaluation of text-to-image models
metrics.py     ``ToMePSNR`` ... : the metrics of this package in an evaluator
prompts.py     ``ToMePromptDataset``: prompts, and perhaps real pictures
subject.py     the model that a runner runs
=============  ===================================================================

``custom_imports = dict(imports=['mmagic_tome'])`` in a config registers them all. Nothing of
mmengine is imported before somebody else imports it.
"""

import functools
import importlib

from ..compat import when_imported

__all__ = ["register_all"]

# When mmengine's own are there, ours are registered beside them.
_PARTS = {
    "mmengine.hooks": ("tome", "evaluate", "profile"),
    "mmengine.runner.loops": ("loops", "prompts"),
    "mmengine.evaluator": ("metrics",),
}
_registered = []


def register_all():
    """Make the names above known to mmengine's registries; calling it again does nothing."""
    if _registered:
        return
    _registered.append(True)
    for module, parts in _PARTS.items():
        when_imported(module, functools.partial(_import, parts))
    when_imported("mmagic.evaluation", _register_in_mmagic)


def _import(parts):
    for part in parts:
        importlib.import_module(f"{__name__}.{part}")


def _register_in_mmagic():
    from .metrics import register_in_mmagic

    register_in_mmagic()
