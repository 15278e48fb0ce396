# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options under a name, chosen by measurement: what to start with.

What each gains and costs, and how they were found: ``docs/research/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import check_choice

#: name -> options of :class:`~mmagic_tome.config.ToMeConfig`.
PRESETS: dict[str, dict[str, Any]] = {
    # The inner part at every second step, but for the first and last of a run.
    "quality": dict(ratio=0, reuse=dict(deep=dict(steps=2, between=(0.1, 0.8), repay=0.5))),
    # The network at every second step; while there is much noise only its inner part.
    "balanced": dict(
        ratio=0,
        reuse=dict(
            network=dict(steps=2, between=(0.1, 0.65), repay=0.5),
            deep=dict(steps=2, between=(0.65, 0.95), repay=0.5),
        ),
    ),
    # The network at every second step from the start, its inner part at every second of those.
    "fast": dict(
        ratio=0,
        reuse=dict(
            network=dict(steps=2, between=(0.0, 0.95)),
            deep=dict(steps=2, between=(0.0, 0.7), repay=0.5),
        ),
    ),
}


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those that ``preset`` stands for, which give way to the others.

    A dict beside a dict wins key by key, as in configs that inherit: ``dict(preset='quality',
    reuse=dict(deep=dict(repay=0)))`` changes that and nothing else.

    Raises:
        ToMeError: no preset of this name.
    """
    options = dict(options)
    name = options.pop("preset", None)
    if name is None:
        return options
    check_choice("", "preset", name, PRESETS, "balanced")
    return _over(PRESETS[name], options)


def _over(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    both = (key for key in options if isinstance(options[key], Mapping))
    merged = {
        key: _over(base[key], options[key]) for key in both if isinstance(base.get(key), Mapping)
    }
    return {**base, **options, **merged}
