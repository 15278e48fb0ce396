# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How attention is computed: diffusers' processors and the backends of torch's own function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from ..errors import ToMeError

# Backends of torch.nn.functional.scaled_dot_product_attention.
_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
ATTENTIONS = {
    "default": "what the network chose itself",
    "flash": "torch's flash attention and nothing else",
    "efficient": "torch's memory-efficient attention (CUDA)",
    "cudnn": "cuDNN's attention (CUDA)",
    "math": "torch's written-out attention",
    "plain": "diffusers' AttnProcessor: two matrix products and a softmax",
    "sliced": "diffusers' SlicedAttnProcessor, one head at a time",
    "xformers": "diffusers with xformers",
}
# Those that hold the scores of all pairs of tokens.
WRITTEN_OUT = ("math", "plain")


def set_processor(network: nn.Module, attention: str) -> None:
    """Choose diffusers' processor of a network, where ``attention`` asks for one.

    Raises:
        ToMeError: the network takes no such processor, or it is not installed.
    """
    try:
        if attention == "plain":
            from diffusers.models.attention_processor import AttnProcessor

            network.set_attn_processor(AttnProcessor())
        elif attention == "sliced":
            network.set_attention_slice("max")
        elif attention == "xformers":
            network.enable_xformers_memory_efficient_attention()
    except (AttributeError, ImportError, ValueError, ModuleNotFoundError) as error:
        raise ToMeError(
            f"--attention {attention} does not work for this {type(network).__name__}: {error}"
        ) from error


@contextmanager
def backend(attention: str) -> Iterator[None]:
    """Torch's attention goes to one backend inside; an error of torch if that cannot serve it."""
    if attention not in _BACKENDS:
        with nullcontext():
            yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, _BACKENDS[attention])):
        yield
