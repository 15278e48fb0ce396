# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``controlnet=``: a ControlNet that is merged along with the network beside it."""

import pytest
import tiny
import torch
from fixed_steps import FIXED
from tiny_unets import tiny_controlnet

from mmagic_tome import (
    ToMeError,
    apply_cache,
    apply_tome,
    get_handle,
    remove_cache,
    remove_tome,
)


class Both(torch.nn.Module):
    """A UNet and what stands beside it, as pipelines and MMagic models have them."""

    def __init__(self, controlnet):
        super().__init__()
        self.unet = tiny.tiny_unet()
        self.controlnet = controlnet

    @torch.no_grad()
    def forward(self):
        given = tiny.tiny_inputs(size=8)
        image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        nets = getattr(self.controlnet, "nets", [self.controlnet])
        for net in nets:
            down, mid = net(**given, controlnet_cond=image, return_dict=False)
        given.update(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        return self.unet(**given).sample


def kept(handle):
    """Beginning of a target's name -> tokens it kept of 64."""
    return {
        "controlnet" if row["target"].startswith("controlnet.") else "unet": row["kept"]
        for row in handle.stats()
    }


def test_they_come_and_go_together():
    model = Both(tiny_controlnet())
    baseline = model()
    with apply_tome(model, ratio=0.5):
        alone = model()
    assert get_handle(model.controlnet) is None
    handle = apply_tome(model, ratio=0.5, controlnet=dict(ratio=0.25, targets=["mlp"]))
    merged = model()
    assert kept(handle) == {"unet": 32, "controlnet": 48}
    assert get_handle(model.controlnet).config.targets == ("mlp",)
    assert not torch.equal(merged, alone) and not torch.equal(merged, baseline)
    assert "controlnet.down_blocks.0" in handle.summary()
    handle.reset_stats()
    assert all(row["calls"] == 0 for row in handle.stats())
    handle.ratio = 0
    assert torch.equal(model(), baseline)
    handle.ratio = 0.5
    model()
    assert kept(get_handle(model)) == {"unet": 32, "controlnet": 32}
    assert remove_tome(model)
    assert get_handle(model.controlnet) is None
    assert torch.equal(model(), baseline)


def test_step_caching_takes_the_controlnet_along():
    model = Both(tiny_controlnet())
    handle = apply_cache(model, FIXED["both"])
    regions = [row["region"] for row in handle.stats()]
    assert regions == ["network", "inner", "controlnet.network"]
    assert get_handle(model.controlnet, "cache").config == handle.config[:1]
    with apply_cache(model, FIXED["inner"]) as inner:  # a ControlNet has no inner region
        assert [row["region"] for row in inner.stats()] == ["inner"]
        assert get_handle(model.controlnet) is None
    assert [row["region"] for row in get_handle(model).stats()] == regions
    with apply_cache(model, FIXED["both"], controlnet=False):
        assert get_handle(model.controlnet) is None
    assert remove_cache(model)
    assert get_handle(model) is None and get_handle(model.controlnet) is None
    # What is applied to the ControlNet alone stays with it.
    apply_cache(model.controlnet, interval=2)
    assert get_handle(model) is None and not remove_cache(model)
    apply_cache(model, FIXED["inner"])
    assert get_handle(model.controlnet, "cache") is not None


def test_replacing_and_putting_back():
    model = Both(tiny_controlnet())
    baseline = model()
    with apply_tome(model, ratio=0.5, controlnet=True):
        both = model()
        with apply_tome(model, ratio=0.5) as inner:
            assert get_handle(model.controlnet) is None
            model()
            assert kept(inner) == {"unet": 32}
        assert torch.equal(model(), both)
        with apply_tome(model.controlnet, ratio=0.25) as own:
            model()
            assert kept(get_handle(model)) == {"unet": 32}, "it is no more merged along"
            assert own.stats()[0]["kept"] == 48
        assert torch.equal(model(), both)
    assert torch.equal(model(), baseline)


def test_several_controlnets():
    several = torch.nn.Module()
    several.nets = torch.nn.ModuleList([tiny_controlnet(seed=1), tiny_controlnet(seed=2)])
    model = Both(several)
    baseline = model()
    handle = apply_tome(model, ratio=0.5, controlnet=True)
    model()
    names = {row["target"].split("down_blocks")[0] for row in handle.stats()}
    assert {"controlnet.nets.0.", "controlnet.nets.1."} < names
    handle.remove()
    assert torch.equal(model(), baseline)


def test_nothing_changes_where_it_cannot_be():
    unet = tiny.tiny_unet()
    with pytest.raises(
        ToMeError, match="asks for a ControlNet, and a UNet2DConditionModel has none"
    ):
        apply_tome(unet, controlnet=True)
    assert get_handle(unet) is None
    model = Both(torch.nn.Linear(1, 1))
    with pytest.raises(ToMeError, match="found no supported network in a Linear"):
        apply_tome(model, controlnet=True)
    assert get_handle(model) is None
