# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging in mmengine's runners: hooks, loops, metrics and a data set of prompts.

=============  ==================================================================
tome.py        ``ToMeHook``: applies, reports, changes the ratio by a schedule
evaluate.py    ``ToMeEvalHook``: images and metrics against the baseline
profile.py     ``ToMeProfileHook``: time of each step, block and target
loops.py       ``ToMeTestLoop``, ``ToMeValLoop``: several methods, any metrics
metrics.py     ``ToMeMetric``, ``ToMeSeconds``
prompts.py     ``ToMePromptDataset``: prompts, and perhaps real images
subject.py     the model of a runner, and generating with it
=============  ==================================================================

``custom_imports = dict(imports=['mmagic_tome'])`` in a config registers them all. Nothing of
mmengine is imported here.
"""

import functools
import importlib

from ..compat import when_imported

__all__ = ["register_all"]

# Module of mmengine -> what is registered once it is imported.
_PARTS = {
    "mmengine.hooks": ("tome", "evaluate", "profile"),
    "mmengine.runner.loops": ("loops", "prompts"),
    "mmengine.evaluator": ("metrics",),
}


@functools.cache
def register_all():
    """Make the names above known to mmengine's registries; calling it again does nothing."""
    for module, parts in _PARTS.items():
        for part in parts:
            name = f"{__name__}.{part}"
            when_imported(module, functools.partial(importlib.import_module, name))
