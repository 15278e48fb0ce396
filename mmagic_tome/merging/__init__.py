# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which tokens become one, and how.

Pure functions of tensors and the :class:`MergePlan` they return. Nothing here
knows of models, configs or libraries other than torch.
"""

from .bipartite import (
    bipartite_soft_matching,
    kth_bipartite,
    merge_source,
    merge_wavg,
    random_bipartite,
)
from .grid2d import GridLayout, random_layout, regular_layout
from .matching import bipartite_match, tokens_to_remove
from .plan import MergePlan

__all__ = [
    "GridLayout",
    "MergePlan",
    "bipartite_match",
    "bipartite_soft_matching",
    "kth_bipartite",
    "merge_source",
    "merge_wavg",
    "random_bipartite",
    "random_layout",
    "regular_layout",
    "tokens_to_remove",
]
