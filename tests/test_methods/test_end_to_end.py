# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every method in a network, through apply_tome."""

import pytest
import torch
from method_requests import SPECS, name_of, request, tokens
from tiny import error, tiny_inputs, tiny_unet

from mmagic_tome import apply_tome
from mmagic_tome.methods import build_method

STEPS = (900, 600, 300)


@pytest.fixture
def unet():
    return tiny_unet(levels=2)


@torch.no_grad()
def run(unet, steps=STEPS, **changes):
    """Outputs of a denoising run of one guided image, whose sample hardly changes."""
    outputs = []
    for i, t in enumerate(steps):
        inputs = tiny_inputs(**changes)
        halves = torch.cat(2 * [inputs["sample"].chunk(2)[0]])
        call = {**inputs, "sample": halves + 0.02 * i, "timestep": torch.tensor(t)}
        outputs.append(unet(**call).sample)
    return torch.stack(outputs)


@pytest.fixture(scope="module")
def baseline():
    return run(tiny_unet(levels=2))


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_fewer_tokens_another_image_and_the_baseline_at_ratio_zero(unet, baseline, spec):
    handle = apply_tome(unet, method=spec, ratio=0.5)
    merged = run(unet)
    for row in handle.stats():
        assert row["kind"] == "attn_kv" and row["plans"] == len(STEPS)
        assert row["tokens"] == 256 and 0 < row["kept"] <= 160
    assert 1e-5 < error(merged, baseline) < 1
    assert torch.equal(run(unet), merged)  # the same run again
    handle.ratio = 0
    assert torch.equal(run(unet), baseline)
    handle.remove()
    assert torch.equal(run(unet), baseline)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tome", "todo"])
def test_plans_compile_without_a_break(name):
    torch.compiler.reset()
    method, ask = build_method(name), request(8, 8)

    def target(x):
        plan = method.plan(x, 0.5, ask)
        return plan.unmerge(plan.merge(x).sin())

    x = tokens(2, 8, 8)
    compiled = torch.compile(target, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), target(x))
