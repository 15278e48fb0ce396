# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the targets of a merged network receive, and what it returns."""

import copy

import pytest
import torch
from model_runs import Seen
from tiny import error, run, tiny_inputs, tiny_unet

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.tome.state import TomePatch

EVERYTHING = dict(max_downsample=8, targets=["attn", "crossattn", "mlp"])


def test_each_kind_of_target_merges_what_it_says(unet):
    inner = {"attn": "attn1.to_q", "crossattn": "attn2.to_q", "mlp": "ff.net.0.proj"}
    baseline = run(unet)
    # Everything below compares outputs; zeros would make all of it true.
    assert baseline.std() > 0.1 and error(run(unet, timestep=torch.tensor(1)), baseline) > 1e-3
    for kind in inner:
        network = copy.deepcopy(unet)
        seen = Seen(network, *inner.values())
        apply_tome(network, ratio=0.25, max_downsample=4, targets=[kind])
        assert 1e-3 < error(run(network), baseline) < 0.6
        for other, suffix in inner.items():
            expected = {192, 48, 12} if other == kind else {256, 64, 16}
            assert set(seen.lengths(suffix).values()) == expected


def test_equals_tomesd_on_the_same_layout(unet):
    import tomesd

    options = dict(ratio=0.5, exact_matching=True, use_rand=False, prop_attn=False)
    with apply_tome(unet, **options, **EVERYTHING):
        ours = run(unet)
    where = dict(max_downsample=8, merge_crossattn=True, merge_mlp=True)
    tomesd.apply_patch(unet, ratio=0.5, use_rand=False, **where)
    inputs = tiny_inputs()
    with torch.no_grad():  # tomesd needs the sample as a positional argument
        theirs = unet(inputs.pop("sample"), **inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_same_seed_same_output_and_untouched_rng(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    state = torch.random.get_rng_state()
    first = run(unet)
    assert torch.equal(torch.random.get_rng_state(), state)
    run(unet, timestep=torch.tensor(20))
    assert torch.equal(run(unet), first)
    apply_tome(unet, ratio=0.5, seed=1, **EVERYTHING)
    assert not torch.equal(run(unet), first)


def test_destinations_change_with_step_and_block(unet, monkeypatch):
    layouts = []
    layout = TomePatch.layout

    def watched(self, *request):
        layouts.append(layout(self, *request))
        return layouts[-1]

    monkeypatch.setattr(TomePatch, "layout", watched)
    apply_tome(unet, ratio=0.5)
    for time in (10, 11):
        run(unet, timestep=torch.tensor(time))
    assert len({tuple(destinations.tolist()) for destinations, _ in layouts}) == len(layouts) == 6


def test_images_of_a_batch_share_one_layout(unet):
    """In tomesd an odd batch has to fall back to regular destinations."""
    inputs = tiny_inputs(batch=1)
    for name in ("sample", "encoder_hidden_states"):
        inputs[name] = inputs[name].repeat_interleave(3, dim=0)
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    out = run(unet, **inputs)
    torch.testing.assert_close(out[1:], out[:1].expand_as(out[1:]), rtol=1e-4, atol=1e-5)


def test_calls_that_are_refused(unet):
    apply_tome(unet)
    with pytest.raises(ToMeError, match="attention_mask"):
        run(unet, attention_mask=torch.ones(2, 256))
    for block in unet.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(16, dim=1)
    assert run(unet).isfinite().all()
    apply_tome(unet, targets=["attn", "mlp"])
    with pytest.raises(ToMeError, match="leave 'mlp' out of targets"):
        run(unet)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    with pytest.raises(ToMeError, match="called outside a forward of its network"):
        block(torch.ones(2, 256, 16))


def test_peak_memory_is_never_above_that_of_the_baseline():
    """To within the byte per cell that says where destinations are."""
    from mmagic_tome.lab.measure import peak_memory

    unet = tiny_unet(levels=2, block_out_channels=(64, 64), norm_num_groups=8)
    inputs = tiny_inputs(size=32)

    def peak():
        return peak_memory(lambda: run(unet, **inputs), "cpu")

    baseline = peak()
    blocks, cells = 3, 16 * 16
    for options in ({}, dict(targets=["attn", "mlp"]), dict(targets="block"), dict(use_rand=False)):
        with apply_tome(unet, ratio=0.5, **options):
            assert peak() <= baseline + blocks * cells + 64, options
