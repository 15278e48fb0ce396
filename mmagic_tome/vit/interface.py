# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Proportional attention where a module has no argument for a mask.

VideoMAE: the attention modules of transformers look their implementation up by the name in their
``config``. Merged modules get a stand-in for it that names an implementation of ours, which adds
the bias and hands on to the one that the model's own config names at that moment.

mmpretrain: its attention modules keep the function that attends as an attribute. Merged modules
get one that adds the bias and hands on to theirs.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

NAME = "mmagic_tome_proportional"


class StandInConfig:
    """The ``config`` of a merged attention module: the model's own but for one name.

    Attributes:
        config: the model's own.
        bias_of: object whose ``bias(module, x)`` gives the bias of the forward under way.
    """

    _attn_implementation = NAME

    def __init__(self, config: Any, bias_of: Any) -> None:
        self.config = config
        self.bias_of = bias_of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a pickled model may be the first to need it
        self.__dict__.update(state)


class ConfigInjection:
    """Puts a stand-in for its config into a module; :meth:`remove`, as hooks have, takes it out."""

    def __init__(self, module: nn.Module, bias_of: Any) -> None:
        register()
        self.module = module
        module.config = StandInConfig(module.config, bias_of)

    def remove(self) -> None:
        """Give the module its config back."""
        if isinstance(self.module.config, StandInConfig):
            self.module.config = self.module.config.config


class BiasedAttention:
    """``scaled_dot_product_attention`` of a module with the bias of proportional attention.

    Attributes:
        attention: the module's own.
        bias_of: object whose ``bias(x)`` gives the bias of the forward under way.
    """

    def __init__(self, attention: Any, bias_of: Any) -> None:
        self.attention = attention
        self.bias_of = bias_of

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        bias = self.bias_of.bias(query)
        if bias is not None:
            kwargs["attn_mask"] = bias
        return self.attention(query, key, value, **kwargs)


class AttributeInjection:
    """Puts a biased attention into a module; :meth:`remove` takes it out."""

    def __init__(self, module: nn.Module, bias_of: Any) -> None:
        self.module = module
        own = module.scaled_dot_product_attention
        module.scaled_dot_product_attention = BiasedAttention(own, bias_of)

    def remove(self) -> None:
        """Give the module its own attention back."""
        injected = self.module.scaled_dot_product_attention
        if isinstance(injected, BiasedAttention):
            self.module.scaled_dot_product_attention = injected.attention


def register() -> None:
    """Make the implementation known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, proportional_attention)


def proportional_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention with the bias of proportional attention added to its mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = module.config
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config.config._attn_implementation, eager)
    bias = config.bias_of.bias(query)
    if bias is not None:
        attention_mask = bias if attention_mask is None else attention_mask + bias
    return attention(module, query, key, value, attention_mask, **kwargs)
