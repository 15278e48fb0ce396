# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the benchmark runs: networks by name, or that of a model; and the ideal to compare with."""

from .base import Network, NetworkWork, Work, share_weights
from .denoisers import DENOISERS
from .ideal import ideal
from .recorded import SourceWork
from .vits import VITS

#: Name -> :class:`Network`.
NETWORKS: dict[str, Network] = {**DENOISERS, **VITS}

__all__ = [
    "DENOISERS",
    "NETWORKS",
    "VITS",
    "Network",
    "NetworkWork",
    "SourceWork",
    "Work",
    "ideal",
    "share_weights",
]
