# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a model looks like: where its blocks, grids and sites are.

One file per model family. A host names modules; it never changes a forward and
knows nothing of how tokens are matched.
"""

from __future__ import annotations

from torch import nn

from ..errors import ToMeError
from .animatediff import AnimateDiffUNet
from .auraflow import AuraFlow
from .base import Block, Host
from .cogvideox import CogVideoX
from .cogview import CogView3Plus, CogView4
from .diffusers_unet import DiffusersUNet
from .dit import DiT, PixArt
from .flux import Bria, Chroma, Flux, Flux2, LongCatImage, OvisImage
from .hunyuan import HunyuanDiT, HunyuanVideo
from .ltx import LTX
from .mmagic_unet import MMagicUNet
from .qwen_image import QwenImage
from .sd3 import SD3
from .unsupported import why_unsupported
from .wan import SkyReelsV2, Wan
from .z_image import Lumina2, ZImage

# The first host that recognises a module wins: specific ones come first.
HOSTS: list[Host] = [
    MMagicUNet(),
    AnimateDiffUNet(),
    DiffusersUNet(),
    DiT(),
    PixArt(),
    HunyuanDiT(),
    SD3(),
    AuraFlow(),
    CogView3Plus(),
    CogView4(),
    Flux(),
    Flux2(),
    Chroma(),
    Bria(),
    LongCatImage(),
    OvisImage(),
    QwenImage(),
    ZImage(),
    Lumina2(),
    Wan(),
    SkyReelsV2(),
    LTX(),
    CogVideoX(),
    HunyuanVideo(),
]

# Attributes that lead from what users hold to the network inside: pipelines and
# MMagic models (.unet, .transformer), MMagic's DiffusersWrapper (.model), DistributedDataParallel
# (.module), torch.compile (._orig_mod).
_WRAPPERS = ("_orig_mod", "unet", "transformer", "module", "model")
_MAX_DEPTH = 6


def find_host(model: object) -> tuple[Host, nn.Module]:
    """The network inside ``model`` that can be merged, and the host that describes it.

    Args:
        model: a diffusers pipeline, a MMagic model, or the network itself, also
            wrapped by DistributedDataParallel, torch.compile or MMagic's DiffusersWrapper.

    Returns:
        tuple: the host and the network.

    Raises:
        ToMeError: no network inside is of a known family; names what was looked at and for.
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
    reason = next(filter(None, map(why_unsupported, seen)), "") or _is_vit(model)
    raise ToMeError(
        f"nothing to merge in a {type(model).__name__} (looked at: {' > '.join(seen)}). {reason}"
        f"Supported: {known}. Pass one of these, or a model or pipeline that has it as .unet or "
        ".transformer; for a model of your own write a host: docs/adding_a_model.md"
    )


def _is_vit(model: object) -> str:
    from ..vit.families import find_vit

    try:
        description = find_vit(model).description
    except ToMeError:
        return ""
    return f"It is a vision transformer ({description}): write r=8, tokens to remove per block. "


def register_host(host: Host) -> Host:
    """Make :func:`~mmagic_tome.apply_tome` know a model family of your own.

    Args:
        host: asked before those that are known already. One of the same class replaces an
            earlier one.

    Returns:
        Host: ``host``.

    Raises:
        ToMeError: not an instance of :class:`Host`, or one without a description.
    """
    if not isinstance(host, Host) or not getattr(host, "description", None):
        raise ToMeError(
            f"a host is an instance of a subclass of mmagic_tome.models.Host with a description, "
            f"got {host!r}; see docs/adding_a_model.md"
        )
    HOSTS[:] = [host, *(other for other in HOSTS if type(other) is not type(host))]
    return host


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


__all__ = ["HOSTS", "Block", "Host", "find_host", "register_host"]
