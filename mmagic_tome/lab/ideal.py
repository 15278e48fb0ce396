# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The ideal: as many tokens removed as by a method, for free. No method can be faster.

Every target gets the first M of its N tokens, and its output is padded with zeros; nothing is
matched, averaged or copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import apply_tome
from ..errors import ToMeError
from ..models import ModelAdapter, find_adapter
from ..patch import find_patch
from ..tome.state import Target, TomePatch


@contextlib.contextmanager
def ideal(network: nn.Module, stats: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Let a network, the baseline, work on as many tokens as a method left, while entered: by the
    ``stats`` of its handle of token merging, after a run. ToMeError: a target whose tokens come in
    parts."""
    # Merging knows where targets begin and end; nothing of it stays in the network.
    sites = [site for site in stats if site["kept"] not in (site["tokens"], None)]
    kinds = list(dict.fromkeys(site["kind"] for site in sites))
    coarsest = max(site["downsample"] for site in sites)
    adapter, inner = find_adapter(network)
    with apply_tome(network, targets=kinds, max_downsample=coarsest):
        targets = {one.name: one for one in find_patch(inner, TomePatch).targets}
    hooks = []
    for site in sites:
        target = targets[site["target"]]
        take = _Take(adapter, target, site["tokens"], site["kept"])
        for path in (target.paths[0], *target.shared):
            module = inner.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(take, with_kwargs=True))
        if target.kind != "attn_kv":
            module = inner.get_submodule(target.paths[-1])
            hooks.append(module.register_forward_hook(take.pad))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Take:
    """Pre-hook that passes on the first ``kept`` of the image's tokens, and a hook that pads. The
    adapter changes other arguments of a module, such as its rotary embeddings."""

    def __init__(self, adapter: ModelAdapter, target: Target, tokens: int, kept: int) -> None:
        self.adapter, self.target = adapter, target
        self.removed = tokens - kept
        # What ModelAdapter.adapt asks of a plan: every token represents itself.
        representative = torch.arange(kept)[None]
        self.plan = SimpleNamespace(
            batch=1, num_tokens=tokens, num_slots=kept, representative=representative
        )

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] < self.plan.num_tokens:
            raise ToMeError(f"no ideal exists for {self.target.name}: its tokens come in parts")
        self.plan.representative = self.plan.representative.to(x.device)
        # Text, where there is some, is in front.
        x = x[:, : x.shape[1] - self.removed]
        if self.target.kind == "attn_kv":
            return args, {**kwargs, self.target.context_argument: x}
        if args:
            args = (x, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": x}
        return self.adapter.adapt(self.target.name, self.plan, args, kwargs)

    def pad(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Zeros for the tokens that were not computed."""
        space, at = (0, 0, 0, self.removed), self.target.output_index
        if not isinstance(output, tuple):
            return F.pad(output, space)
        return (*output[:at], F.pad(output[at], space), *output[at + 1 :])
