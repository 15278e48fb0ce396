# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import torch

from mmagic_tome.merging import FramePlan, MergePlan, as_clips


def test_frames_of_a_clip_merge_to_one_sequence():
    slot = torch.tensor([[0, 0, 1, 1, 2, 2], [2, 1, 0, 0, 1, 2]])
    plan = FramePlan(MergePlan(slot, 3), num_frames=2)
    assert (plan.batch, plan.num_tokens, plan.num_slots) == (4, 3, 3)
    x = torch.arange(4 * 3 * 2.0).view(4, 3, 2)  # two clips of two frames of three tokens
    merged = plan.merge(x)
    assert merged.shape == (2, 3, 2)
    # The last token of the first frame and the first of the second share a slot.
    torch.testing.assert_close(merged[0, 1], (x[0, 2] + x[1, 0]) / 2)
    back = plan.unmerge(merged)
    assert torch.equal(back[0, 2], merged[0, 1]) and torch.equal(back[1, 0], merged[0, 1])
    assert torch.equal(as_clips(x, 2)[1, 3:], x[3])
    assert repr(plan) == "FramePlan(2 frames, MergePlan(batch=2, 6 -> 3 tokens))"
