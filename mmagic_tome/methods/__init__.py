# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token reduction methods by name: one file each, registered by :func:`register_method`."""

from .base import METHODS, Method, PlanRequest, build_method, register_method
from .downsample import Downsample
from .importance import Importance
from .pitome import PiToMe
from .prune import Prune
from .sito import SiTo
from .threshold import Threshold
from .todo import ToDo
from .tofu import ToFu
from .toma import ToMA
from .tome import ToMe

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
