# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which tokens become one: merging methods by name, registered by :func:`register_method`."""

from .base import METHODS, Method, PlanRequest, build_method, register_method
from .todo import ToDo
from .tome import ToMe

__all__ = ["METHODS", "Method", "PlanRequest", "ToDo", "ToMe", "build_method", "register_method"]
