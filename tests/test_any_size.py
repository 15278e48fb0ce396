# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Any grid, batch, precision and order of calls."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_tome, get_handle, remove_tome

SIDES = st.integers(1, 26)
CALLS = st.tuples(SIDES, SIDES, st.integers(1, 4), st.integers(0, 999))
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TARGETS = [["attn"], ["attn", "crossattn", "mlp"], ["mlp"], "block", "stack"]
OPTIONS = [{}, dict(targets="block"), dict(plan_interval=2), dict(targets="attn")]


@pytest.fixture(scope="module")
def original():
    """One level, since diffusers wants multiples of its factor."""
    return tiny_unet(levels=1)


@torch.no_grad()
def run(network, size=16, batch=2, time=500, entries=slice(None)):
    inputs = tiny_inputs(batch=batch, size=size)
    inputs = {key: value[entries] if value.dim() else value for key, value in inputs.items()}
    return network(**{**inputs, "timestep": torch.tensor(time)}).sample


@settings(max_examples=40, **QUIET)
@given(
    size=st.one_of(st.tuples(SIDES, SIDES), st.sampled_from([(1, 64), (17, 90), (33, 31)])),
    batch=st.integers(1, 8),
    cell=st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda cell: cell != (1, 1)),
    share=st.floats(0, 1),
    random=st.booleans(),
    targets=st.sampled_from(TARGETS),
)
def test_every_grid(original, size, batch, cell, share, random, targets):
    (height, width), (sx, sy) = size, cell
    ratio = share * (1 - 1 / (sx * sy))
    baseline = run(original, size, batch)
    options = dict(ratio=ratio, sx=sx, sy=sy, use_rand=random, targets=targets)
    with apply_tome(original, **options) as handle:
        merged = run(original, size, batch)
        assert merged.shape == baseline.shape and merged.isfinite().all()
        # Every complete cell keeps one destination; of the rest a fraction is removed.
        tokens, destinations = height * width, (height // sy) * (width // sx)
        removed = min(int(tokens * ratio), tokens - destinations) if destinations else 0
        seen = {(row["tokens"], row["kept"]) for row in handle.stats()}
        assert seen == {(tokens, tokens - removed)}
        if removed == 0:
            assert torch.equal(merged, baseline)
        assert torch.equal(run(original, size, batch), merged)
        # Entries do not touch each other.
        one = run(original, size, batch, entries=slice(batch - 1, batch))
        torch.testing.assert_close(one, merged[-1:], rtol=1e-3, atol=1e-4)
        handle.ratio = 0
        assert torch.equal(run(original, size, batch), baseline)
    assert torch.equal(run(original, size, batch), baseline)


@settings(max_examples=12, **QUIET)
@given(
    calls=st.lists(CALLS, min_size=2, max_size=4),
    options=st.sampled_from(OPTIONS),
    fails=st.booleans(),
)
def test_a_call_owes_nothing_to_the_ones_before(original, calls, options, fails):
    """Each returns what the first of a run returns: with times that rise, every call is one."""

    def fail(*_):
        raise MemoryError

    apply_tome(original, ratio=0.5, **options)
    try:
        for height, width, batch, time in sorted(calls, key=lambda call: call[3]):
            if fails:
                hook = original.mid_block.register_forward_pre_hook(fail)
                with pytest.raises(MemoryError):
                    run(original, (9, 8), 2, time)
                hook.remove()
            found = run(original, (height, width), batch, time)
            get_handle(original).reset_run()
            assert torch.equal(run(original, (height, width), batch, time), found)
    finally:
        remove_tome(original)
