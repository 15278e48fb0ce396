# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a model looks like: where its blocks, grids and sites are.

One file per model family. A host names modules; it never changes a forward and
knows nothing of how tokens are matched.
"""

from __future__ import annotations

from torch import nn

from ..errors import ToMeError
from .base import Block, Host
from .diffusers_unet import DiffusersUNet
from .mmagic_unet import MMagicUNet

# The first host that recognises a module wins: specific ones come first.
HOSTS: list[Host] = [MMagicUNet(), DiffusersUNet()]

# Attributes that lead from what users hold to the network inside: pipelines and
# MMagic models (.unet), MMagic's DiffusersWrapper (.model), DistributedDataParallel
# (.module), torch.compile (._orig_mod).
_WRAPPERS = ("_orig_mod", "unet", "module", "model")
_MAX_DEPTH = 6


def find_host(model: object) -> tuple[Host, nn.Module]:
    """The network inside ``model`` that can be merged, and the host that describes it.

    Args:
        model: a diffusers pipeline, a MMagic model, or the network itself, also
            wrapped by DistributedDataParallel, torch.compile or MMagic's DiffusersWrapper.

    Returns:
        tuple: the host and the network.

    Raises:
        ToMeError: no network inside is of a known family; names what was looked at.
    """
    seen = []
    current = model
    called = None
    for _ in range(_MAX_DEPTH):
        seen.append(type(current).__name__)
        if isinstance(current, nn.Module):
            for host in HOSTS:
                if host.matches(current):
                    return host, called or current
            if called is None and _runs_blocks_itself(current):
                called = current
        current = next(
            (
                inner
                for inner in (_attribute(current, name) for name in _WRAPPERS)
                if isinstance(inner, nn.Module)
            ),
            None,
        )
        if current is None:
            break
    known = "; ".join(host.description for host in HOSTS)
    raise ToMeError(
        f"nothing to merge in a {type(model).__name__} (looked at: {' > '.join(seen)}). "
        f"Supported: {known}. Pass one of these, or a model or pipeline that has it as .unet"
    )


def _runs_blocks_itself(wrapper: nn.Module) -> bool:
    """Whether a wrapper was given a forward of its own that calls the blocks inside directly.

    MMagic's ViCo does that: the forward of the UNet inside never runs, so the
    wrapper is the network whose call begins and ends a forward.
    """
    own = "forward" in vars(wrapper) and "_orig_mod" not in wrapper._modules
    return own and hasattr(wrapper, "down_blocks")


def _attribute(owner: object, name: str) -> object:
    # Some wrappers raise other errors than AttributeError for a missing name.
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


__all__ = ["HOSTS", "Block", "Host", "find_host"]
