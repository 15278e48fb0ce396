# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Who runs a network: dense, ours, tomesd, MMagic's own token merging, and the ideal.

Every contender gets a copy of the network that shares its weights, so all of them can be ready
at the same time and take turns, compiled ones too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ToMeConfig, apply_tome
from ..contenders import apply_tomesd
from ..errors import ToMeError
from ..hosts import find_host

DENSE, OURS, TOMESD, MMAGIC, IDEAL = "dense", "ours", "tomesd", "mmagic", "ideal"
CONTENDERS = (DENSE, OURS, TOMESD, MMAGIC, IDEAL)


def share_weights(network: nn.Module) -> nn.Module:
    """A copy of a network with hooks and sub-modules of its own and the same weights."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


@dataclass
class Contender:
    """One way to run the network.

    Attributes:
        name (str): in tables.
        kind (str): of :data:`CONTENDERS`.
        config (ToMeConfig | None): what it merges; None for dense.
        network (nn.Module): its copy of the network.
        ideal (str | None): name of the contender that does the same for free.
        sites (list): for ours, ``ToMeHandle.stats()`` after the warm-up: what was merged where.
    """

    name: str
    kind: str
    config: ToMeConfig | None
    network: nn.Module
    ideal: str | None = None
    sites: list[dict[str, Any]] = field(default_factory=list)


def prepare(
    wanted: list[str],
    network: nn.Module,
    config: ToMeConfig,
    own: Mapping[str, ToMeConfig],
    run: Callable[[nn.Module], Tensor],
) -> tuple[list[Contender], dict[str, str]]:
    """Make contenders ready to run.

    Args:
        wanted: names of :data:`CONTENDERS`.
        network: dense; it is not changed.
        config: what ours, tomesd and MMagic's own are to merge, where they know the options.
        own: more configs of ours, by name.
        run: runs a network once, without gradients.

    Returns:
        tuple: the contenders, and for each that cannot take part its name and one line that says
        why. Dense is always the first.
    """
    ready = [Contender(DENSE, DENSE, None, share_weights(network))]
    missing: dict[str, str] = {}

    def attempt(name: str, kind: str, options: ToMeConfig, make: Callable) -> None:
        one = Contender(name, kind, options, share_weights(network))
        try:
            make(one)
        except Exception as error:  # whatever a contender dies of: that is a result too
            missing[name] = _reason(error)
        else:
            ready.append(one)

    configs = {OURS: config} if OURS in wanted else {}
    configs.update(own)
    for name, options in configs.items():
        attempt(name, OURS, options, lambda one: _ours(one, run))
    for name, make in ((TOMESD, _tomesd), (MMAGIC, _mmagic)):
        if name in wanted:
            attempt(name, name, config, lambda one, make=make: make(one, run))
    if IDEAL in wanted:
        _add_ideals(ready, attempt, network, config, run)
    return ready, missing


def _add_ideals(ready, attempt, network, config, run) -> None:
    """One ideal for each set of tokens that is removed somewhere; who does that knows its name."""
    known: dict[tuple, str] = {}
    mergers = [one for one in ready if one.kind == OURS]
    if not any(one.config == config for one in mergers):
        # Nobody of ours merges what the others merge: a run of it says how much that is.
        probe = Contender("", OURS, config, share_weights(network))
        try:
            _ours(probe, run)
        except Exception:
            pass
        else:
            mergers.append(probe)
    for one in mergers:
        kept = tuple((site["block"], site["kind"], site["kept"]) for site in one.sites)
        if kept not in known:
            known[kept] = IDEAL if one.config == config else f"{IDEAL} for {one.name}"
            attempt(
                known[kept],
                IDEAL,
                one.config,
                lambda ideal, sites=one.sites: _ideal(ideal, sites, run),
            )
        one.ideal = known[kept]
        if one.config == config:
            for other in ready:
                if other.kind in (TOMESD, MMAGIC):
                    other.ideal = known[kept]
    for one in ready:
        if one.kind == IDEAL:
            one.ideal = one.name


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ToMeError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."


# --- one function per contender -------------------------------------------------------------------


def _ours(one: Contender, run) -> None:
    handle = apply_tome(one.network, one.config)
    run(one.network)
    one.sites = handle.stats()


def _tomesd_options(config: ToMeConfig, network: nn.Module) -> dict[str, Any]:
    """The options that tomesd and MMagic's copy of it know, as keyword arguments."""
    level = config.max_downsample
    if level == "auto":
        host, network = find_host(network)
        level = min(block.downsample for block in host.blocks(network))
    names = ("ratio", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")
    return {"max_downsample": level, **{name: getattr(config, name) for name in names}}


def _tomesd(one: Contender, run) -> None:
    apply_tomesd(one.network, _tomesd_options(one.config, one.network))
    run(one.network)


def _mmagic(one: Contender, run) -> None:
    """MMagic's ``tomesd_cfg`` as MMagic itself would apply it, to the network alone."""
    try:
        from mmagic.models.utils import set_tomesd
    except ImportError as error:
        raise ToMeError(f"MMagic cannot be imported: {error}") from error
    # It looks for a class of this name, and what it finds decides which block it puts in.
    model = type("StableDiffusion", (), {"unet": one.network})()
    set_tomesd(model, **_tomesd_options(one.config, one.network))
    run(one.network)


def _ideal(one: Contender, sites: list[dict[str, Any]], run) -> None:
    host, network = find_host(one.network)
    modules = {
        (block.name, kind): module
        for block in host.blocks(network)
        for kind, module in block.sites.items()
    }
    modules.update({(block.name, "block"): block.module for block in host.blocks(network)})
    for site in sites:
        module = modules.get((site["block"], site["kind"]))
        if module is None:
            raise ToMeError(f"there is no ideal for sites of kind {site['kind']!r} yet")
        take = _Take(site["kept"])
        module.register_forward_pre_hook(take, with_kwargs=True)
        module.register_forward_hook(_Pad(take), with_kwargs=True)
    run(one.network)


class _Take:
    """Pre-hook: the first of the tokens, for free."""

    def __init__(self, kept: int) -> None:
        self.kept, self.removed = kept, 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        x = args[0] if args else kwargs["hidden_states"]
        self.removed = max(0, x.shape[1] - self.kept)
        kept = x[:, : self.kept]
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})


class _Pad:
    """Hook: zeros for the tokens that were not computed."""

    def __init__(self, take: _Take) -> None:
        self.take = take

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.pad(output[0], (0, 0, 0, self.take.removed)), *output[1:])
        return F.pad(output, (0, 0, 0, self.take.removed))
