# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmagic_tome import ToMeError
from mmagic_tome.vit import apply_tome_vit
from mmagic_tome.vit.config import (
    relative_cost,
    removed_for_speedup,
    removed_per_block,
    tokens_per_block,
)


def test_schedules():
    for r, expected in (
        (8, [8] * 5),
        ([5, 0, 2], [5, 0, 2, 0, 0]),
        ((8, -1), [16, 12, 8, 4, 0]),
        ((8, 1.0), [0, 4, 8, 12, 16]),
        ((8, -0.5), [12, 10, 8, 6, 4]),
        ((8, 0), [8] * 5),
    ):
        assert removed_per_block(r, 5) == expected
    assert removed_per_block((8, -1), 1) == [8]
    # Linear schedules remove as much as constant ones, halves are rounded up.
    for blocks in (2, 12, 24):
        for inflect in (-1, -0.3, 0.5, 1):
            counts = removed_per_block((13, inflect), blocks)
            assert abs(sum(counts) - 13 * blocks) <= 1
            assert counts == sorted(counts, reverse=inflect < 0)
            assert counts[0] == int(13 * (1 - inflect) + 0.5)
            assert counts[-1] == int(13 * (1 + inflect) + 0.5)
    # No block removes more than half.
    assert tokens_per_block([100, 4, 100], 21, 1) == [(21, 11), (11, 7), (7, 4)]


@pytest.mark.parametrize(
    "sizes",  # blocks, tokens, protected, channels, channels in the feed-forward
    [(12, 197, 1, 384, 1536), (24, 577, 1, 1024, 4096), (4, 1500, 0, 384, 1536), (3, 9, 4, 8, 8)],
)
def test_a_target_is_reached_by_the_smallest_r(sizes):
    """Against trying every r."""
    blocks, tokens, prefix, *channels = sizes
    dense = relative_cost([(tokens, tokens)] * blocks, *channels)
    counts = [tokens_per_block([r] * blocks, tokens, prefix) for r in range(tokens)]
    reached = [dense / relative_cost(count, *channels) for count in counts]
    assert reached == sorted(reached)
    for target in (1.0, 1.3, 2.0, 2.7):
        if reached[-1] < target:
            said = rf"out of reach.*gives {reached[-1]:.1f}; write a sm"
            with pytest.raises(ToMeError, match=said):
                removed_for_speedup(target, *sizes)
        else:
            r = removed_for_speedup(target, *sizes)
            assert reached[r] >= target and (r == 0 or reached[r - 1] < target)


def test_counted_operations_are_those_of_the_blocks():
    """Against torch's own counter, on a model with 17 tokens."""
    timm = pytest.importorskip("timm.models.vision_transformer")

    model = timm.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, mlp_ratio=2.5
    ).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # the counter knows no fused attention on a CPU
            module.fused_attn = False
    for r in (0, 3):
        handle = apply_tome_vit(model, r=r)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 16, 16))
        parts = counter.get_flop_counts()
        blocks = [parts[f"VisionTransformer.blocks.{index}"] for index in range(2)]
        found = sum(sum(block.values()) for block in blocks) / 2
        expected = relative_cost(handle.tokens, 12, 30)
        # Only the products of the matching are not in ours: 8 x 8 pairs of heads of 6 channels.
        assert expected <= found <= expected + (0 if r == 0 else 2 * 8 * 8 * 6)
