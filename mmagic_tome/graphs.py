# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What torch's compiler has to know of merged networks, and what it must leave alone.

What a denoising run carries from step to step is decided in Python, by the number and the timestep
of the step: inside a graph every step would be another constant and so another graph. Such code is
kept out (:class:`Outside`); what lies between, whole blocks or networks, is compiled as usual.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

REASON = (
    "mmagic_tome: what is carried from step to step (refresh, residual, reuse, ratios by noise, "
    "methods that watch the step) is decided outside of graphs; write fullgraph=False"
)

# Methods that wait for the compiler to be there: importing it takes seconds, and most that import
# this package never need it.
_waiting: list[tuple[type, str, Outside]] = []


class Outside:
    """Decorator of a method that never becomes part of a compiled graph.

    Args:
        inner (bool): whether what it calls may be compiled on its own. Default False.

    Example:
        >>> class Hook:
        ...     @Outside()
        ...     def decide(self, step): ...
    """

    def __init__(self, inner: bool = False) -> None:
        self.inner = inner

    def __call__(self, method: Callable[..., Any]) -> Outside:
        self.method = method
        return self

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self.method)
        _waiting.append((owner, name, self))


def prepare_compiler() -> None:
    """To be called once a network has hooks: see the module, and let graphs depend on hooks.

    By default dynamo takes for granted that hooks never change and that two models of one
    class have the same ones: a graph that was compiled for a dense model would silently go on
    serving it after ``apply_tome``, and would serve a merged copy of it as well.
    """
    import torch._dynamo.config as dynamo

    disable = torch.compiler.disable
    # torch before 2.8 gives no reason.
    why = {"reason": REASON} if "reason" in inspect.signature(disable).parameters else {}
    while _waiting:
        owner, name, outside = _waiting.pop()
        setattr(owner, name, disable(outside.method, recursive=not outside.inner, **why))
    if getattr(dynamo, "skip_nnmodule_hook_guards", False):
        dynamo.skip_nnmodule_hook_guards = False
        # What was compiled before lacks the guards.
        torch.compiler.reset()
