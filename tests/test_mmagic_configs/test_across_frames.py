# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merging across the frames of a clip: the plan, and the UNet of AnimateDiff in diffusers."""

import pytest
import tiny
import torch
from denoise import denoising, outputs_at
from tiny_pipelines import FRAMES, motion_inputs, motion_unet

from mmagic_tome import ToMeError, apply_tome, get_handle, remove_tome
from mmagic_tome.merging import MergePlan
from mmagic_tome.merging.frames import FramePlan, as_clips


@torch.no_grad()
def run(unet, given):
    return unet(**given).sample


def test_the_plan_is_that_of_a_clip():
    slot = torch.tensor([[0, 0, 1, 1, 2, 2], [2, 1, 0, 0, 1, 2]])
    plan = FramePlan(MergePlan(slot, 3), num_frames=2)
    assert (plan.batch, plan.num_tokens, plan.num_slots) == (4, 3, 3)
    x = torch.arange(4 * 3 * 2.0).view(4, 3, 2)  # two clips of two frames of three tokens
    merged = plan.merge(x)
    assert merged.shape == (2, 3, 2)
    # The second slot of the first clip: the last token of its first frame, the first of its second.
    torch.testing.assert_close(merged[0, 1], (x[0, 2] + x[1, 0]) / 2)
    torch.testing.assert_close(plan.unmerge(merged)[1, 0], merged[0, 1])
    assert torch.equal(plan.unmerge(merged), plan.unmerge(merged).reshape(4, 3, 2))
    assert torch.equal(as_clips(x, 2)[1, 3:], x[3])


def test_what_stands_still_is_computed_once():
    """Where all frames are alike, merging across them loses far less than frame by frame."""
    from mmagic_tome import ToMeConfig
    from mmagic_tome.merging import random_layout
    from mmagic_tome.methods import PlanRequest

    frame = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    frames = frame.expand(4, -1, -1)
    method = ToMeConfig().methods[0]

    def lost(x, height):
        fields = dict.fromkeys(PlanRequest.__dataclass_fields__)
        fields.update(height=height, width=8, sx=2, sy=2, exact=True)
        fields["layout"] = lambda: random_layout(height, 8, 2, 2, seed=0).select(0)
        plan = method.plan(x, 0.5, PlanRequest(**fields))
        return (plan.unmerge(plan.merge(x)) - x).pow(2).mean()

    assert lost(as_clips(frames, 4), 32) < 0.2 * lost(frames, 8)


@pytest.mark.parametrize(
    "targets", [["attn"], ["crossattn", "mlp"], ["block"]], ids=lambda targets: "+".join(targets)
)
def test_diffusers_motion_unet(targets):
    unet, given = motion_unet(), motion_inputs()
    baseline = run(unet, given)
    handle = apply_tome(unet, ratio=0.5, targets=targets, across_frames=True)
    merged = run(unet, given)
    for row in handle.stats():
        assert (row["tokens"], row["kept"]) == (FRAMES * 64, FRAMES * 32)
    assert "across frames" in handle.summary()
    assert merged.isfinite().all() and (merged - baseline).abs().max() > 1e-3
    assert torch.equal(run(unet, given), merged)
    # Clips do not mix, and every one is given its own text.
    for clip in range(2):
        text = given["encoder_hidden_states"][clip * FRAMES : (clip + 1) * FRAMES]
        alone = dict(given, sample=given["sample"][clip : clip + 1], encoder_hidden_states=text)
        torch.testing.assert_close(run(unet, alone)[0], merged[clip], rtol=1e-3, atol=1e-4)
    if targets == ["attn"]:  # what a key stands for is counted through the frames
        apply_tome(unet, ratio=0.5, targets=targets, across_frames=True, prop_attn=True)
        weighed = run(unet, given)
        assert weighed.isfinite().all() and (weighed - merged).abs().max() > 1e-3
        handle = apply_tome(unet, ratio=0.5, targets=targets, across_frames=True)
    handle.ratio = 0
    assert torch.equal(run(unet, given), baseline)
    remove_tome(unet)
    assert torch.equal(run(unet, given), baseline)


def test_it_is_another_thing_than_frame_by_frame():
    unet, given = motion_unet(), motion_inputs()
    with apply_tome(unet, ratio=0.5, targets=["mlp"]) as handle:
        apart = run(unet, given)
        assert {row["tokens"] for row in handle.stats()} == {64}
    with apply_tome(unet, ratio=0.5, targets=["mlp"], across_frames=True):
        together = run(unet, given)
    assert (apart - together).abs().max() > 1e-3


@pytest.mark.parametrize("residual", [False, True], ids=["plans alone", "residual"])
def test_plans_and_residuals_that_serve_several_steps(residual):
    unet, given = motion_unet(), motion_inputs()
    options = dict(plan_interval=2, residual=residual)
    apply_tome(unet, ratio=0.5, targets=["mlp"], across_frames=True, **options)
    steps = list(denoising(unet, given, (500, 480)))
    assert {row["plans"] for row in get_handle(unet).stats()} == {1}
    remove_tome(unet)
    baseline = outputs_at(unet, given, steps)
    error = [(step.output - one).abs().mean() for step, one in zip(steps, baseline)]
    assert torch.equal(steps[0].output, baseline[0]) == residual
    assert 0 < error[1] < (0.1 if residual else 0.5) * baseline[1].abs().mean()


def test_gradients_also_under_checkpointing():
    unet, given = motion_unet(), motion_inputs()
    apply_tome(unet, ratio=0.5, targets=["attn", "mlp"], across_frames=True)

    def gradient():
        unet.zero_grad()
        unet(**given).sample.square().mean().backward()
        return unet.conv_in.weight.grad.clone()

    plain = gradient()
    unet.train()
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)
    assert plain.abs().sum() > 0


def test_what_has_no_frames_says_so():
    with pytest.raises(ToMeError, match="UNet2DConditionModel does not work frame by frame"):
        apply_tome(tiny.tiny_unet(), across_frames=True)


def test_attention_along_frames_inside_a_block_needs_all_places(sd_folder):
    """An option of MMagic's UNet that its configs leave off."""
    pytest.importorskip("mmagic")
    config = tiny.tiny_config("AnimateDiff", sd_folder)
    config["unet"].update(unet_use_temporal_attention=True)
    from mmagic.registry import MODELS

    unet = tiny.randomise(MODELS.build(config["unet"]))
    for target in ("block", "stack"):
        with pytest.raises(ToMeError, match=r"along the frames of one position.*'attn', 'mlp'"):
            apply_tome(unet, targets=[target])
    given = motion_inputs()
    given["encoder_hidden_states"] = given["encoder_hidden_states"][::FRAMES]  # MMagic repeats it
    baseline = run(unet, given)
    with apply_tome(unet, ratio=0.5, targets=["attn", "mlp"], across_frames=True) as handle:
        assert (run(unet, given) - baseline).abs().max() > 1e-3
        assert {row["kept"] for row in handle.stats()} == {FRAMES * 32}
    assert torch.equal(run(unet, given), baseline)


def test_the_merge_map_of_a_clip_shows_its_frames_below_each_other():
    from mmagic_tome.lab.maps import Recorder, merged_blocks

    unet, given = motion_unet(), motion_inputs()
    # As many slots as two of three frames have tokens: more than one frame has.
    handle = apply_tome(unet, ratio=0.3, across_frames=True)
    with Recorder(merged_blocks(handle)) as recorder:
        run(unet, given)
    assert recorder.records
    for record in recorder.records:
        assert record.grid == (FRAMES * 8, 8) and record.slot.shape == (FRAMES * 64,)
