# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which tokens become one, and how: functions of tensors and their plans, on torch alone."""

from .frames import FramePlan, as_clips
from .grid2d import GridLayout, grid_layout, random_layout, regular_layout
from .joint import JointPlan, join_sequence, joint_plan, split_sequence
from .matching import (
    bipartite_match,
    nearest_destination,
    plan_of_edges,
    strongest,
    tokens_to_remove,
)
from .plan import IndexPlan, MergePlan, Plan, PrunedPlan
from .published import (
    bipartite_soft_matching,
    kth_bipartite,
    merge_source,
    merge_wavg,
    random_bipartite,
)
from .sequence import match_tokens

__all__ = [
    "FramePlan",
    "GridLayout",
    "IndexPlan",
    "JointPlan",
    "MergePlan",
    "Plan",
    "PrunedPlan",
    "as_clips",
    "bipartite_match",
    "bipartite_soft_matching",
    "grid_layout",
    "join_sequence",
    "joint_plan",
    "kth_bipartite",
    "match_tokens",
    "merge_source",
    "merge_wavg",
    "nearest_destination",
    "plan_of_edges",
    "random_bipartite",
    "random_layout",
    "regular_layout",
    "split_sequence",
    "strongest",
    "tokens_to_remove",
]
