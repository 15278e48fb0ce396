# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Proportional attention in modules that take no attention mask, by replacing an attribute.

VideoMAE: attention modules of transformers look up their implementation by the name in their
``config``. Merged modules get a :class:`ConfigProxy` that names an implementation of ours. It adds
the bias and calls the implementation that the model's own config names at that moment.

mmpretrain: attention modules keep the attention function as an attribute. Merged modules get a
:class:`BiasedAttention` around it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

NAME = "mmagic_tome_proportional"


class Injection:
    """Takes the place of an attribute of a merged attention module."""

    attribute = ""

    def __init__(self, own: Any, hook: Any) -> None:
        self.own = own  # what the attribute was
        self.hook = hook  # whose ``bias(x)`` returns the bias of the forward under way

    @classmethod
    def inject(cls, module: nn.Module, hook: Any) -> None:
        """Put one in place of a module's attribute."""
        setattr(module, cls.attribute, cls(getattr(module, cls.attribute), hook))

    @classmethod
    def eject(cls, module: nn.Module) -> None:
        """Undo :meth:`inject`."""
        injected = getattr(module, cls.attribute)
        if isinstance(injected, cls):
            setattr(module, cls.attribute, injected.own)


class ConfigProxy(Injection):
    """The ``config`` of a merged attention module: the model's own except for one name."""

    attribute = "config"
    _attn_implementation = NAME

    def __init__(self, own: Any, hook: Any) -> None:
        self.__setstate__({"own": own, "hook": hook})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "own" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickling may come before any apply_tome_vit.
        _implementations().register(NAME, proportional_attention)
        self.__dict__.update(state)


class BiasedAttention(Injection):
    """``scaled_dot_product_attention`` of a module with the bias of proportional attention."""

    attribute = "scaled_dot_product_attention"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        bias = self.hook.bias(query)
        if bias is not None:
            kwargs["attn_mask"] = bias
        return self.own(query, key, value, **kwargs)


def proportional_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention with the bias of proportional attention added to its mask."""
    proxy = module.config
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = _implementations().get_interface(proxy.own._attn_implementation, eager)
    bias = proxy.hook.bias(query)
    if bias is not None and attention_mask is not None:
        # A mask of the model itself, which further channels cannot replace.
        proxy.hook.patch.context.keys.log_size = None
        bias = attention_mask + bias
    attention_mask = attention_mask if bias is None else bias
    return attention(module, query, key, value, attention_mask, **kwargs)


def _implementations() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS
