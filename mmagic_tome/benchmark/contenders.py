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

from torch import Tensor, nn

from ..errors import ToMeError
from .kinds import DENSE, IDEAL, MMAGIC, OURS, TOMESD, Call, Merging


def share_weights(network: nn.Module) -> nn.Module:
    """A copy of a network with hooks and sub-modules of its own and the same weights."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


@dataclass
class Contender:
    """One way to run the network.

    Attributes:
        name (str): in tables.
        kind (str): of :data:`.kinds.CONTENDERS`.
        config: what it merges, see :meth:`.kinds.Merging.config`; None for dense.
        network (nn.Module): its copy of the network.
        ideal (str | None): name of the contender that does the same for free.
        output (Tensor | None): of its first forward; None for dense, which did not run yet.
        sites (list): for ours, what was merged where; see :meth:`.kinds.Merging.ours`.
    """

    name: str
    kind: str
    config: Any
    network: nn.Module
    ideal: str | None = None
    output: Tensor | None = None
    sites: list[dict[str, Any]] = field(default_factory=list)


def prepare(
    wanted: list[str],
    network: nn.Module,
    merging: Merging,
    config: Any,
    own: Mapping[str, Any],
    run: Call,
) -> tuple[list[Contender], dict[str, str]]:
    """Make contenders ready to run.

    Args:
        wanted: names of :data:`.kinds.CONTENDERS`.
        network: dense; it is not changed.
        merging: how tokens are merged in it.
        config: what ours, tomesd and MMagic's own are to merge, where they know the options.
        own: more configs of ours, by name.
        run: runs a network once, without gradients.

    Returns:
        tuple: the contenders, and for each that cannot take part its name and one line that says
        why. Dense is always the first.
    """
    ready = [Contender(DENSE, DENSE, None, share_weights(network))]
    missing: dict[str, str] = {}

    def attempt(name: str, kind: str, options: Any, make: Callable) -> None:
        one = Contender(name, kind, options, share_weights(network))

        def noted(network: nn.Module) -> Tensor:
            one.output = run(network)
            return one.output

        try:
            make(one, noted)
        except Exception as error:  # whatever a contender dies of: that is a result too
            missing[name] = _reason(error)
        else:
            ready.append(one)

    def ours(one: Contender, run: Call) -> None:
        one.sites = merging.ours(one.network, one.config, run)

    configs = {OURS: config} if OURS in wanted else {}
    configs.update(own)
    for name, options in configs.items():
        attempt(name, OURS, options, ours)
    for name in (TOMESD, MMAGIC):
        if name in wanted and name in merging.contenders:
            attempt(
                name,
                name,
                config,
                lambda one, run: merging.other(one.kind, one.network, config, run),
            )
    if IDEAL in wanted:
        _add_ideals(ready, attempt, network, merging, config, run)
    return ready, missing


def _add_ideals(ready, attempt, network, merging, config, run) -> None:
    """One ideal for each set of tokens that is removed somewhere; who does that knows its name."""
    known: dict[tuple, str] = {}
    mergers = [one for one in ready if one.kind == OURS]
    if not any(one.config == config for one in mergers):
        # Nobody of ours merges what the others merge: a run of it says how much that is.
        probe = Contender("", OURS, config, share_weights(network))
        try:
            probe.sites = merging.ours(probe.network, config, run)
        except Exception:
            pass
        else:
            mergers.append(probe)
    for one in mergers:
        if all(site["kept"] in (site["tokens"], None) for site in one.sites):
            continue  # what merges nothing, such as step caching alone, has no ideal
        kept = tuple((site["block"], site["kind"], site["kept"]) for site in one.sites)
        if kept not in known:
            known[kept] = IDEAL if one.config == config else f"{IDEAL} for {one.name}"
            attempt(
                known[kept],
                IDEAL,
                one.config,
                lambda ideal, run, sites=one.sites: merging.ideal(ideal.network, sites, run),
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
