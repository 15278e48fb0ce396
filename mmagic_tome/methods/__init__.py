# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token reduction methods by name, registered by :func:`register_method`.

=============  ================================================
on_grid.py     ``tome``, ``prune``, ``tofu``, ``threshold``
squares.py     ``todo``, ``downsample``
others         the method that they are named after
=============  ================================================
"""

from .base import METHODS, Method, PlanRequest, build_method, register_method
from .importance import Importance
from .on_grid import Prune, Threshold, ToFu, ToMe
from .pitome import PiToMe
from .sito import SiTo
from .squares import Downsample, ToDo
from .toma import ToMA

__all__ = [
    "METHODS",
    "Downsample",
    "Importance",
    "Method",
    "PiToMe",
    "PlanRequest",
    "Prune",
    "SiTo",
    "Threshold",
    "ToDo",
    "ToFu",
    "ToMA",
    "ToMe",
    "build_method",
    "register_method",
]
