# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a patch is, and what several of them need.

A patch is a generator around the import of one module, like a function for
:func:`contextlib.contextmanager`: what is before ``yield`` runs before the code of that module,
what is after it runs after. A patch that returns without ``yield`` found no symptom and touched
nothing. The first paragraph of its docstring is the symptom.
"""

import contextlib
import functools
import importlib.util
import sys
import types

PATCHES = []


def patch_of(module, lasting=False):
    """Declare a patch of the import of a module whose import (or use) shows the symptom.

    ``lasting``: whether it changes something that is used after the import as well, and so makes
    sense for a module that was imported earlier.
    """

    def declare(function):
        function.module = module
        function.lasting = lasting
        function.symptom = " ".join(function.__doc__.split("\n\n")[0].split())
        PATCHES.append(function)
        return function

    return declare


def is_installed(name):
    """Whether a module can be found, without importing it (its parents are)."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@contextlib.contextmanager
def substituted(name, module):
    """``sys.modules[name]`` is ``module`` inside the context, and as before after it."""
    missing = object()
    before = sys.modules.get(name, missing)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is missing:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before


def replace_method(owner, name):
    """Decorator: the function replaces a method and receives the original as first argument."""
    original = getattr(owner, name)

    def replace(function):
        @functools.wraps(original)
        def method(*args, **kwargs):
            return function(original, *args, **kwargs)

        setattr(owner, name, method)

    return replace


class Absent(types.ModuleType):
    """In place of a module that is not there; its names say so where they are called."""

    def __init__(self, name, remedy):
        super().__init__(name)
        self.remedy = remedy

    def __getattr__(self, name):
        if name.startswith("__"):  # what the import system asks for
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}", self.remedy)

    def __call__(self, *args, **kwargs):
        raise ImportError(f"{self.__name__} is used here, but {self.remedy}")
