# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""FLOPs: by hand, and alike for everything that does the same work."""

import pytest
import torch
from tiny import tiny_inputs, tiny_unet
from torch import nn

from mmagic_tome import apply_tome
from mmagic_tome.lab.measure import count_flops, count_flops_of


class Net(nn.Module):
    """Convolution, self-attention and feed-forward over 16x16 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.feed_forward = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(2, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


def test_flops_of_a_small_network_are_those_counted_by_hand():
    net, batch, tokens = Net(), 2, 16 * 16
    multiply_adds = 3 * 9 * 32 + 32 * 96 + 32 * 32 + 2 * 32 * 128  # per token
    multiply_adds += 2 * 32 * tokens  # scores and weighted means
    expected = 2 * batch * tokens * multiply_adds
    x = torch.randn(batch, 3, 16, 16)
    assert count_flops(lambda: net(x)) == pytest.approx(expected, rel=0.01)
    share = 2 * batch * tokens * 2 * 32 * 128
    assert count_flops_of(net.feed_forward, lambda: net(x))[1] == share
    assert count_flops_of(net.feed_forward, lambda: (net(x), net(x)))[1] == 2 * share


def test_flops_of_a_product_in_8_bits():
    left, right = (torch.ones(shape, dtype=torch.int8) for shape in ((32, 16), (16, 24)))
    assert count_flops(lambda: torch._int_mm(left, right)) == 2 * 32 * 16 * 24


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_merging_costs_the_same_in_8_bits_in_full_and_in_tomesd(ratio, monkeypatch):
    tomesd = pytest.importorskip("tomesd")
    from mmagic_tome.merging import int8

    unet, x = tiny_unet(), tiny_inputs()
    inputs = (x["sample"], x["timestep"], x["encoder_hidden_states"])
    baseline = count_flops(lambda: unet(*inputs))
    monkeypatch.setattr(int8, "AVAILABLE", True)
    found = []
    for exact in (False, True):
        with apply_tome(unet, ratio=ratio, exact_matching=exact):
            found.append(count_flops(lambda: unet(*inputs)))
    tomesd.apply_patch(unet, ratio=ratio)
    found.append(count_flops(lambda: unet(*inputs)))
    tomesd.remove_patch(unet)
    assert found[0] == found[1] == found[2] < baseline

    # And by hand: 2 images, 3 self-attentions with 256 tokens of width 16 each.
    left = 256 - int(256 * ratio)
    saved = 4 * 2 * (256 - left) * 16 * 16  # q, k, v and the projection behind them
    saved += 2 * 2 * (256**2 - left**2) * 16  # scores and weighted means
    search = 2 * 192 * 64 * 16
    assert baseline - found[0] == 2 * 3 * (saved - search)
