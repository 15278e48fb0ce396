# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""ControlNets that are merged, or skipped, along with the network that reads their output."""

from types import SimpleNamespace

import pytest
import torch
from fixed_steps import FIXED
from tiny import tiny_unet
from tiny_pipelines import PIPELINES

from mmagic_tome import (
    ToMeError,
    apply_cache,
    apply_tome,
    get_handle,
    remove_cache,
    remove_tome,
)

CASE, SEVERAL = PIPELINES["ControlNet"], PIPELINES["several ControlNets"]


def kept(handle):
    """Which network -> tokens that its last target kept of 64."""
    return {
        "controlnet" if row["target"].startswith("controlnet.") else "unet": row["kept"]
        for row in handle.stats()
    }


def test_merged_with_options_of_its_own_and_removed_with_the_network():
    pipeline = CASE.pipeline()
    baseline = CASE.run(pipeline)
    with apply_tome(pipeline, ratio=0.5) as handle:
        alone = CASE.run(pipeline)
        assert list(handle.networks) == [""] and get_handle(pipeline.controlnet) is None
    handle = apply_tome(pipeline, ratio=0.5, controlnet=dict(ratio=0.25, targets=["mlp"]))
    assert list(handle.networks) == list(get_handle(pipeline).networks) == ["", "controlnet"]
    merged = CASE.run(pipeline)
    assert not torch.equal(merged, alone) and not torch.equal(merged, baseline)
    assert kept(handle) == {"unet": 32, "controlnet": 48}
    assert get_handle(pipeline.controlnet).config.targets == ("mlp",)
    assert "controlnet.down_blocks.0" in handle.summary()
    handle.reset_stats()
    assert all(row["calls"] == 0 for row in handle.stats())
    handle.ratio = 0
    assert torch.equal(CASE.run(pipeline), baseline)
    handle.ratio = 0.5
    CASE.run(pipeline)
    assert kept(get_handle(pipeline)) == {"unet": 32, "controlnet": 32}
    assert remove_tome(pipeline) and get_handle(pipeline.controlnet) is None
    assert torch.equal(CASE.run(pipeline), baseline)


def test_replaced_and_restored():
    pipeline = CASE.pipeline()
    with apply_tome(pipeline, ratio=0.5, controlnet=True):
        both = CASE.run(pipeline)
        with apply_tome(pipeline, ratio=0.5) as inner:
            assert get_handle(pipeline.controlnet) is None
            CASE.run(pipeline)
            assert kept(inner) == {"unet": 32}
        assert torch.equal(CASE.run(pipeline), both)
        with apply_tome(pipeline.controlnet, ratio=0.25) as own:
            CASE.run(pipeline)
            assert kept(get_handle(pipeline)) == {"unet": 32}, "it is no more merged along"
            assert own.stats()[0]["kept"] == 48
        assert torch.equal(CASE.run(pipeline), both)


def test_several():
    pipeline = SEVERAL.pipeline()
    handle = apply_tome(pipeline, ratio=0.5, controlnet=True)
    SEVERAL.run(pipeline)
    calls = {row["target"].split("down_blocks")[0]: row["calls"] for row in handle.stats()}
    assert calls["controlnet.nets.0."] == calls["controlnet.nets.1."] == SEVERAL.calls
    handle.remove()
    assert all(get_handle(net) is None for net in pipeline.controlnet.nets)


def test_skipped_with_the_network():
    pipeline = CASE.pipeline()
    handle = apply_cache(pipeline, FIXED["both"])
    regions = [row["region"] for row in handle.stats()]
    assert regions == ["network", "inner", "controlnet.network"]
    assert get_handle(pipeline.controlnet, "cache").config == handle.config[:1]
    with apply_cache(pipeline, FIXED["inner"]) as inner:  # a ControlNet has no inner region
        assert [row["region"] for row in inner.stats()] == ["inner"]
        assert get_handle(pipeline.controlnet) is None
    assert [row["region"] for row in get_handle(pipeline).stats()] == regions
    with apply_cache(pipeline, FIXED["both"], controlnet=False) as alone:
        assert [row["region"] for row in alone.stats()] == ["network", "inner"]
        assert get_handle(pipeline.controlnet) is None
    assert remove_cache(pipeline)
    assert get_handle(pipeline) is None and get_handle(pipeline.controlnet) is None
    # What is applied to the ControlNet alone stays with it.
    apply_cache(pipeline.controlnet, interval=2)
    assert get_handle(pipeline) is None and not remove_cache(pipeline)
    apply_cache(pipeline, FIXED["inner"])
    assert get_handle(pipeline.controlnet, "cache") is not None


@pytest.mark.parametrize("case", [CASE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize(
    ("setting", "guess_mode"),
    [(FIXED["most"], False), (dict(tolerance=0.5), False), (dict(tolerance=0.5), True)],
    ids=["fixed", "tolerance", "guess mode"],
)
def test_how_often_controlnets_run(case, setting, guess_mode):
    """Guess mode calls them for the prompt alone, and the network for both."""
    pipeline, ran = case.pipeline(), []
    nets = getattr(pipeline.controlnet, "nets", [pipeline.controlnet])
    for net in nets:
        net.conv_in.register_forward_hook(lambda *call: ran.append(1))
    for along in (True, False):
        with apply_cache(pipeline, setting, controlnet=along) as handle:
            ran.clear()
            case.run(pipeline, num_inference_steps=12, guess_mode=guess_mode)
            network, *others = (row for row in handle.stats() if "inner" not in row["region"])
            assert network["skipped"] >= 3 and len(others) == len(nets) * along
            assert len(ran) == len(nets) * (12 - network["skipped"] * along)


def test_nothing_changes_where_there_is_none_or_an_unknown_one():
    unet = tiny_unet()
    for model, says in (
        (unet, "asks for a ControlNet, and a UNet2DConditionModel has none"),
        (SimpleNamespace(unet=unet, controlnet=torch.nn.Linear(1, 1)), "network in a Linear"),
    ):
        with pytest.raises(ToMeError, match=says):
            apply_tome(model, controlnet=True)
        assert get_handle(unet) is None
