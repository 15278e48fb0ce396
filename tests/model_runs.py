# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Calls of networks, what they return and what modules inside receive."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mmagic_tome.models import find_adapter


def output(network, inputs):
    """The image of a call."""
    return image(network(**inputs, return_dict=False)[0])


def image(out):
    """Some networks return a list of images, ControlNets one of levels."""
    if not isinstance(out, list):
        return out
    return torch.stack(out) if out[0].shape == out[-1].shape else out[-1]


@torch.no_grad()
def run(network, inputs, **changes):
    """The same without gradients."""
    return output(network, {**inputs, **changes})


def difference(one, other):
    """Root mean square, in units of the spread of the second."""
    return float((one - other).pow(2).mean().sqrt() / other.std())


def counts(handle):
    """(tokens, kept tokens) of all targets."""
    return {(row["tokens"], row["kept"]) for row in handle.stats()}


def grids_of(network, monkeypatch):
    """A list that every call of the network appends its token grid to."""
    grids, (adapter, _) = [], find_adapter(network)
    read = adapter.grid
    monkeypatch.setattr(adapter, "grid", lambda *call: grids.append(read(*call)) or grids[-1])
    return grids


class Seen:
    """Tokens that modules inside really receive: name -> (B, N, C)."""

    def __init__(self, network, *endings):
        self.given = {}
        names = {module: name for name, module in network.named_modules()}

        def note(module, args, kwargs, output):
            self.given[names[module]] = args[0] if args else kwargs["hidden_states"]

        for module, name in names.items():
            if name.endswith(endings):
                # Behind the module: in front of it other hooks see the unmerged tokens.
                module.register_forward_hook(note, with_kwargs=True)

    def lengths(self, ending=""):
        """name -> N, of names with an ending."""
        given = self.given.items()
        return {name: x.shape[1] for name, x in given if name.endswith(ending)}


class AttentionCalls(TorchFunctionMode):
    """Notes (query, key, value, mask) of every call of ``scaled_dot_product_attention``."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, args), **(kwargs or {}))
            self.calls.append(tuple(map(given.get, names)))
        return func(*args, **(kwargs or {}))

    def lengths(self):
        """Number of queries, keys and values of every call."""
        return [tuple(one.shape[-2] for one in call[:3]) for call in self.calls]
