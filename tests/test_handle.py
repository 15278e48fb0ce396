# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import gc
import pickle
import weakref

import pytest
import torch
from denoise import denoise, denoising
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeConfig, ToMeError, apply_cache, apply_tome, get_handle, remove_tome

EVERYTHING = dict(max_downsample=8, targets=["attn", "crossattn", "mlp"])


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=3)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


@torch.no_grad()
def run(unet, **changes):
    return unet(**{**tiny_inputs(), **changes}).sample


def hooks_of(module):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    return [hook for pair in tables for table in pair for hook in table.values()]


def test_nested_with_puts_the_outer_one_back(unet):
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
        assert outer.active and get_handle(unet).ratio == 0.25
        outer.reset()
        assert torch.equal(run(unet), expected)
        assert {(row["kept"], row["calls"]) for row in outer.stats()} == {(192, 1)}
    assert torch.equal(run(unet), baseline) and not hooks_of(unet)


def test_with_puts_back_what_was_applied_for_good_also_in_a_copy(unet):
    apply_tome(unet, ratio=0.25)
    expected = run(unet)
    for network in (unet, pickle.loads(pickle.dumps(unet)), copy.deepcopy(unet)):
        count = len(hooks_of(network))
        with apply_tome(network, ratio=0.5):
            assert not torch.equal(run(network), expected)
        assert torch.equal(run(network), expected) and len(hooks_of(network)) == count
        remove_tome(network)
        assert not hooks_of(network)


def test_with_leaves_alone_what_replaced_it_inside(unet):
    with apply_tome(unet, ratio=0.25):
        with apply_tome(unet, ratio=0.5):
            last = apply_tome(unet, ratio=0.75)
        assert last.active and get_handle(unet).ratio == 0.75
    assert last.active
    with apply_tome(unet, ratio=0.5):
        remove_tome(unet)
    assert get_handle(unet) is None


def test_exception_inside_with_removes(unet):
    with pytest.raises(KeyError), apply_tome(unet):
        raise KeyError
    assert get_handle(unet) is None


def test_a_handle_that_was_replaced_changes_nothing_and_says_so(unet):
    old = apply_tome(unet, ratio=0.25)
    new = apply_tome(unet, ratio=0.5)
    with pytest.raises(ToMeError, match="removed or replaced"):
        old.ratio = 0.1
    new.ratio = 0.1
    assert get_handle(unet).ratio == 0.1


def test_stats_count_and_reset(unet):
    handle = apply_tome(unet, ratio=0.5, targets=["attn", "mlp"])
    assert all(row["tokens"] is None and row["calls"] == 0 for row in handle.stats())
    run(unet)
    run(unet)
    rows = handle.stats()
    assert [row["kind"] for row in rows] == ["attn", "mlp"] * 3
    # Two sites of a block share one plan.
    assert all(row["calls"] == 2 and row["plans"] == 2 for row in rows)
    assert all((row["tokens"], row["kept"]) == (256, 128) for row in rows)
    assert set(rows[0]) == {
        *("target", "block", "kind", "downsample", "tokens", "kept"),
        *("calls", "unmerged_calls", "plans"),
    }
    handle.reset()
    assert all(row["tokens"] is None and row["plans"] == 0 for row in handle.stats())


def test_summary_reads(unet):
    handle = apply_tome(unet, ratio=0.5)
    assert "not run yet" in handle.summary()
    run(unet)
    text = handle.summary()
    assert "ratio 0.5" in text and "256   128      50%" in text
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn" in text
    handle.remove()
    assert "(removed)" in handle.summary() and "removed" in repr(handle)


def test_config_object_and_bad_ratio_assignment(unet):
    handle = apply_tome(unet, ToMeConfig(ratio=0.25, seed=3), ratio=0.5)
    assert handle.config == ToMeConfig(ratio=0.5, seed=3)
    with pytest.raises(ToMeError, match="ceiling"):
        handle.ratio = 0.9
    assert handle.ratio == 0.5


