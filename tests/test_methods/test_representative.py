# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every plan names a token that represents each of its slots."""

import pytest
import torch
from method_requests import SPECS, name_of, request, tokens

from mmagic_tome.methods import build_method


@pytest.mark.parametrize("grid", [(8, 8), (7, 10)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_representative_of_a_slot_is_in_it(spec, grid):
    asked = request(*grid, guidance_map=torch.rand(1, *grid))
    plan = build_method(spec).plan(tokens(2, *grid), 0.5, asked)
    kept = plan.representative
    assert kept.shape == (2, plan.num_slots) and kept.dtype == torch.int64
    slots = torch.arange(plan.num_slots).expand(2, -1)
    if name_of(spec).startswith("toma"):
        # A token belongs to several slots: to its own by the largest share, as a rule.
        assert (plan.slot.gather(1, kept) == slots).float().mean() > 0.9
    else:
        assert torch.equal(plan.slot.gather(1, kept), slots)


def test_destinations_represent_what_merges_into_them():
    asked = request(8, 8)
    destinations, _ = asked.layout()
    for method in ("tome", "tofu"):
        plan = build_method(method).plan(tokens(2, 8, 8), 0.6, asked)
        assert torch.equal(plan.representative[:, :16], destinations.expand(2, -1))
