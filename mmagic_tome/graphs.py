# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What torch's compiler must know of patched networks, and what it must leave alone.

State kept between steps is decided in Python: inside a graph every step would be another constant,
and so another graph. Such code is kept out (:class:`eager_only`); what lies between, whole blocks
or networks, is compiled as usual.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("mmagic_tome")

_REASON = (
    "mmagic_tome: what depends on the denoising step (step caching, plan_interval, ratios by "
    "timestep) is decided outside of graphs; write fullgraph=False"
)

# eager_only methods that wait for the compiler: importing it takes seconds, and most users never
# need it.
_waiting: list[tuple[type, str, bool]] = []


class eager_only:
    """Decorator of a method that never becomes part of a compiled graph; ``inner``: modules that it
    calls may be compiled on their own."""

    def __init__(self, inner: bool = False) -> None:
        self.inner = inner

    def __call__(self, method: Callable[..., Any]) -> eager_only:
        self.method = method
        return self

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self.method)
        _waiting.append((owner, name, self.inner))


def prepare_compiler() -> None:
    """Make compiled graphs depend on hooks; to be called before hooks are registered.

    By default dynamo assumes that hooks never change and that two models of one class have the same
    ones: a graph of the unpatched model would silently serve the patched one.
    """
    import torch._dynamo.config as dynamo

    disable = torch.compiler.disable
    # torch before 2.8 takes no reason.
    why = {"reason": _REASON} if "reason" in inspect.signature(disable).parameters else {}
    while _waiting:
        owner, name, inner = _waiting.pop()
        setattr(owner, name, disable(vars(owner)[name], recursive=not inner, **why))
    if getattr(dynamo, "skip_nnmodule_hook_guards", False):
        logger.info(
            "torch._dynamo.config.skip_nnmodule_hook_guards is now False and compiled graphs are "
            "dropped: graphs compiled before do not notice hooks"
        )
        dynamo.skip_nnmodule_hook_guards = False
        # What was compiled before lacks the guards.
        torch.compiler.reset()
