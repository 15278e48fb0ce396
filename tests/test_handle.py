# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What handles show, change and put back."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from denoise import denoise, denoising, outputs_at
from fixed_steps import FIXED
from tiny import hooks_of, run, tiny_inputs

from mmagic_tome import ToMeConfig, ToMeError, apply_cache, apply_tome, get_handle, remove_tome

INPUTS = tiny_inputs()


def test_with_puts_back_what_was_applied_before(unet):
    baseline = run(unet)
    with apply_tome(unet, ratio=0.25) as outer:
        expected = run(unet)
        with apply_tome(unet, ratio=0.5) as middle:
            halved = run(unet)
            with pytest.raises(KeyError), apply_tome(unet, ratio=0.75) as inner:
                assert not outer.active and not middle.active
                raise KeyError
            assert middle.active and not inner.active
            assert get_handle(unet).ratio == 0.5 and torch.equal(run(unet), halved)
        outer.reset_stats()
        for network in (unet, pickle.loads(pickle.dumps(unet)), copy.deepcopy(unet)):
            with apply_tome(network, ratio=0.5):
                pass
            assert get_handle(network).ratio == 0.25 and torch.equal(run(network), expected)
        assert {(row["kept"], row["calls"]) for row in outer.stats()} == {(192, 1)}
    assert torch.equal(run(unet), baseline) and not hooks_of(unet)


def test_with_leaves_alone_what_replaced_it_inside(unet):
    with apply_tome(unet, ratio=0.25) as old:
        with apply_tome(unet, ratio=0.5):
            last = apply_tome(unet, ratio=0.75)
        assert last.active and get_handle(unet).ratio == 0.75
    assert last.active
    with pytest.raises(ToMeError, match="removed or replaced"):
        old.ratio = 0.1
    last.ratio = 0.1
    assert get_handle(unet).ratio == 0.1
    with apply_tome(unet, ratio=0.5):
        remove_tome(unet)
    assert get_handle(unet) is None


def test_stats_count_and_reset(unet):
    handle = apply_tome(unet, ToMeConfig(ratio=0.25, seed=3, targets=["attn", "mlp"]), ratio=0.5)
    assert handle.config == ToMeConfig(ratio=0.5, seed=3, targets=["attn", "mlp"])
    empty = {"tokens": None, "kept": None, "calls": 0, "unmerged_calls": 0, "plans": 0}
    assert all({**row, **empty} == row for row in handle.stats())
    assert "not run yet" in handle.summary()
    run(unet)
    run(unet)
    rows = handle.stats()
    assert [row["kind"] for row in rows] == ["attn", "mlp"] * 3
    # Two targets of a block share one plan.
    assert all(row["calls"] == 2 and row["plans"] == 2 for row in rows)
    assert all((row["tokens"], row["kept"]) == (256, 128) for row in rows)
    assert rows[0].keys() == {"target", "block", "kind", "downsample", *empty}
    text = handle.summary()
    assert "ratio=0.5, targets=['attn', 'mlp'], seed=3" in text and "256   128      50%" in text
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn" in text
    with pytest.raises(ToMeError, match="ceiling"):
        handle.ratio = 0.9
    handle.ratio = 0
    run(unet)
    assert {(row["calls"], row["unmerged_calls"]) for row in handle.stats()} == {(3, 1)}
    handle.reset_stats()
    assert all({**row, **empty} == row for row in handle.stats())
    handle.remove()
    assert "(removed)" in handle.summary() and "removed" in repr(handle)


def test_stats_and_summary_of_step_caching(unet):
    handle = apply_cache(unet, FIXED["most"])
    assert "not run yet" in handle.summary() and handle.network is unet
    denoise(unet, INPUTS)
    text = handle.summary()
    assert "step caching in UNet2DConditionModel" in text and "not run yet" not in text
    assert "network every 2 steps in [0, 0.95)" in text and "inner every 2 steps" in text
    assert text.splitlines()[-1].split() == ["inner", "4", "2"]
    handle.reset_stats()
    assert {(row["computed"], row["skipped"]) for row in handle.stats()} == {(0, 0)}


# --- both -----------------------------------------------------------------------------------------

APPLY = dict(
    merging=lambda unet: apply_tome(unet, max_downsample=8, targets=["attn", "crossattn", "mlp"]),
    plans=lambda unet: apply_tome(unet, plan_interval=3),
    cache=lambda unet: apply_cache(unet, interval=3),
    inner=lambda unet: apply_cache(unet, region="inner"),
)


@pytest.mark.parametrize("apply", APPLY.values(), ids=APPLY)
def test_disabled_is_the_baseline_in_this_thread_alone(unet, apply):
    baseline = denoise(unet, INPUTS)
    handle = apply(unet)
    expected = denoise(unet, INPUTS)
    assert not torch.equal(expected, baseline)
    with pytest.raises(KeyError), handle.disabled():
        with handle.disabled():
            pass
        assert torch.equal(denoise(unet, INPUTS), baseline)
        with ThreadPoolExecutor(1) as thread:
            assert torch.equal(thread.submit(denoise, unet, INPUTS).result(), expected)
        raise KeyError
    assert torch.equal(denoise(unet, INPUTS), expected)


@pytest.mark.parametrize("forget", ["disabled", "reset_run"])
@pytest.mark.parametrize(("name", "steps"), [("cache", 2)])
def test_a_run_that_is_forgotten_begins_anew(unet, name, steps, forget):
    handle = APPLY[name](unet)

    def next_one(forgets):
        loop = denoising(unet, INPUTS)
        for _ in range(steps):
            next(loop)
        if forgets == "disabled":
            with handle.disabled():
                pass
        elif forgets == "reset_run":
            handle.reset_run()
        return next(loop)

    kept, anew = next_one(None), next_one(forget)
    handle.remove()
    # The first step of a run is the baseline.
    assert torch.equal(anew.output[None], outputs_at(unet, INPUTS, [anew]))
    assert not torch.equal(kept.output, anew.output)
