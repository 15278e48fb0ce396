# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Any grid, batch, precision and order of calls, by hand and by hypothesis."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_unet
from tiny_pipelines import GRIDS

from mmagic_tome import apply_tome, get_handle, remove_tome

SIDES = st.integers(1, 26)
CALLS = st.tuples(SIDES, SIDES, st.integers(1, 4), st.integers(0, 999))
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def original():
    """One level, since diffusers wants multiples of its factor."""
    return tiny_unet(levels=1)


@torch.no_grad()
def run(network, size=16, batch=2, time=500):
    inputs = tiny_inputs(batch=batch, size=size)
    return network(**{**inputs, "timestep": torch.tensor(time)}).sample


def kept_tokens(height, width, ratio, sx, sy):
    """What is left: every complete cell keeps one destination, of the rest a share goes."""
    tokens, destinations = height * width, (height // sy) * (width // sx)
    if not destinations:
        return tokens
    return tokens - min(int(tokens * ratio), tokens - destinations)


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_odd_grids_and_batches(original, size, batch):
    network = copy.deepcopy(original)
    handle = apply_tome(network, ratio=0.5, targets=["attn", "crossattn", "mlp"])
    merged = run(network, size, batch)
    assert merged.shape == (batch, 4, *size) and merged.isfinite().all()
    tokens = size[0] * size[1]
    seen = {(row["tokens"], row["kept"]) for row in handle.stats()}
    assert seen == {(tokens, kept_tokens(*size, 0.5, 2, 2))}
    if batch > 1:  # entries do not touch each other
        inputs = tiny_inputs(batch=batch, size=size)
        one = {k: v[-1:] if v.dim() else v for k, v in inputs.items()}
        with torch.no_grad():
            torch.testing.assert_close(network(**one).sample, merged[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_autocast(original, dtype, batch):
    """Both with guidance (a batch of two halves) and without; close to what float32 gives."""
    network = copy.deepcopy(original)
    baseline = run(network, batch=batch)
    handle = apply_tome(network, ratio=0.5, use_rand=False, targets=["attn", "mlp"])
    expected = run(network, batch=batch)
    with torch.autocast("cpu", dtype):
        found = run(network, batch=batch)
        assert {row["kept"] for row in handle.stats()} == {128}
        handle.ratio = 0
        plain = run(network, batch=batch)
    assert found.isfinite().all()
    # Rounding may send a token to another destination, so that the image is close as a whole;
    # it is closer to the merged one in float32 than merging is to the baseline one.
    error = (found.float() - expected).pow(2).mean().sqrt()
    assert error < 0.7 * (expected - baseline).pow(2).mean().sqrt()
    torch.testing.assert_close(plain.float(), baseline, rtol=0.1, atol=0.1)


@settings(max_examples=30, **QUIET)
@given(
    height=SIDES,
    width=SIDES,
    batch=st.integers(1, 5),
    cell=st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda cell: cell != (1, 1)),
    share=st.floats(0, 1),
    random=st.booleans(),
    targets=st.sampled_from([["attn"], ["attn", "crossattn", "mlp"], ["mlp"], "block", "stack"]),
)
def test_every_grid(original, height, width, batch, cell, share, random, targets):
    sx, sy = cell
    ratio = share * (1 - 1 / (sx * sy))
    baseline = run(original, (height, width), batch)
    options = dict(ratio=ratio, sx=sx, sy=sy, use_rand=random, targets=targets)
    with apply_tome(original, **options) as handle:
        merged = run(original, (height, width), batch)
        assert merged.shape == baseline.shape and merged.isfinite().all()
        kept = kept_tokens(height, width, ratio, sx, sy)
        seen = {(row["tokens"], row["kept"]) for row in handle.stats()}
        assert seen == {(height * width, kept)}
        if kept == height * width:
            assert torch.equal(merged, baseline)
        assert torch.equal(run(original, (height, width), batch), merged)
        handle.ratio = 0
        assert torch.equal(run(original, (height, width), batch), baseline)
    assert torch.equal(run(original, (height, width), batch), baseline)


@settings(max_examples=12, **QUIET)
@given(
    calls=st.lists(CALLS, min_size=2, max_size=4),
    options=st.sampled_from(
        [
            {},
            dict(targets=["attn", "mlp"]),
            dict(targets="block"),
            dict(plan_interval=2),
            dict(plan_interval=2, residual=True),
        ]
    ),
    fails=st.booleans(),
)
def test_a_call_owes_nothing_to_the_ones_before(original, calls, options, fails):
    """Another size, batch or step, a failed call: each returns what the first of a run returns.

    Times do not fall, so that no call goes on with the run of the one before.
    """
    calls = sorted(calls, key=lambda call: call[3])
    apply_tome(original, ratio=0.5, **options)
    try:
        for height, width, batch, time in calls:
            if fails:
                hook = original.mid_block.register_forward_pre_hook(_fail)
                with pytest.raises(MemoryError):
                    run(original, (9, 8), 2, time)
                hook.remove()
            found = run(original, (height, width), batch, time)
            handle = get_handle(original)
            handle.reset_run()
            assert torch.equal(run(original, (height, width), batch, time), found)
    finally:
        remove_tome(original)


def _fail(*_):
    raise MemoryError
