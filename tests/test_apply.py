# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Applying and removing, and what a model is afterwards."""

import copy

import pytest
import torch
from denoise import denoise
from tiny import hooks_of, run, tiny_inputs, tiny_unet
from tiny_pipelines import PIPELINES

from mmagic_tome import (
    CacheHandle,
    ToMeError,
    ToMeHandle,
    apply_cache,
    apply_tome,
    get_handle,
    remove_cache,
    remove_tome,
)

EVERYTHING = dict(max_downsample=8, targets=["attn", "crossattn", "mlp"])
BOTH = [dict(region="network"), dict(region="inner")]
NO_FINE_ATTENTION = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
UNMERGEABLE = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)


def test_nothing_is_added_but_hooks_and_classes_and_nothing_is_left(unet):
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    others = hooks_of(unet)

    def state():
        modules = list(unet.modules())
        return list(unet.state_dict()), [type(m) for m in modules], [set(vars(m)) for m in modules]

    keys, classes, attributes = state()
    apply_tome(unet, **EVERYTHING)
    run(unet)
    now = state()
    assert hooks_of(unet) != others and now[0] == keys
    assert all(issubclass(one, plain) for one, plain in zip(now[1], classes))
    assert remove_tome(unet) and not remove_tome(unet)
    apply_cache(unet, BOTH)
    run(unet)
    now = state()
    assert hooks_of(unet) == others and now[0] == keys and now[1] != classes
    assert [one.__name__ for one in now[1]] == [one.__name__ for one in classes]
    assert all(issubclass(one, plain) for one, plain in zip(now[1], classes))
    assert remove_cache(unet) and not remove_cache(unet)
    assert state() == (keys, classes, attributes) and hooks_of(unet) == others
    for module in unet.modules():
        assert not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs
    assert calls == [1, 1]


def test_applying_again_replaces_and_failing_changes_nothing(unet):
    first = apply_tome(unet, ratio=0.25)
    second = apply_tome(unet, ratio=0.5)
    assert not first.active and second.active
    run(unet)
    assert {row["kept"] for row in second.stats()} == {128}
    first.remove()  # a second time it is harmless, and must not touch the second
    apply_cache(unet, interval=3)
    for options in (dict(ratio=0.95), dict(ratio=0.25, foo=1), dict(controlnet=True)):
        with pytest.raises(ToMeError):
            apply_tome(unet, **options)
        assert get_handle(unet).ratio == 0.5
    for options in (dict(interval=1), dict(region="inner", num_outer_blocks=3), dict(foo=1)):
        with pytest.raises(ToMeError):
            apply_cache(unet, **options)
        assert get_handle(unet, "cache").config[0].interval == 3


class Pipeline:
    def __init__(self, **parts):
        vars(self).update(parts)


def test_a_max_downsample_without_blocks_names_the_levels_that_have_some():
    """As SDXL has none at the finest level; there 'auto' merges the next (test_pipelines.py)."""
    network = tiny_unet(levels=3, **NO_FINE_ATTENTION)
    with pytest.raises(ToMeError) as error:
        apply_tome(network, max_downsample=1)
    for text in ("max_downsample=1", "2 (3 blocks)", "4 (", "Write max_downsample=2 or 'auto'"):
        assert text in str(error.value)


def test_no_target_of_the_wanted_kind():
    network = tiny_unet(levels=2, **UNMERGEABLE)
    network.mid_block = None
    with pytest.raises(ToMeError, match="no transformer block") as error:
        apply_tome(network)
    for text in ("UNet2DConditionModel", "with down_blocks and up_blocks", "add_a_model.md"):
        assert text in str(error.value)
    # In a pipeline another network may have some.
    unet = tiny_unet(levels=1)
    with pytest.warns(UserWarning, match="'prior' stays as it is.*no transformer block"):
        handle = apply_tome(Pipeline(unet=unet, prior=network))
    assert handle.networks == {"unet": unet} and not hooks_of(network)
    for block in unet.modules():
        if hasattr(block, "attn2"):
            block.attn2 = None
    with pytest.raises(ToMeError, match=r"a target crossattn, .* have attn, attn_kv, mlp"):
        apply_tome(unet, targets=["crossattn"])


@pytest.mark.parametrize("first", ["tome", "cache"])
def test_both_techniques_are_applied_and_removed_apart(unet, first):
    inputs = tiny_inputs()
    baseline = denoise(unet, inputs)
    apply = dict(tome=lambda: apply_tome(unet), cache=lambda: apply_cache(unet, BOTH))
    kinds = dict(tome=ToMeHandle, cache=CacheHandle)
    second = "cache" if first == "tome" else "tome"
    alone = {}
    for name in apply:
        with apply[name]():
            alone[name] = denoise(unet, inputs)
    assert get_handle(unet) is None
    apply[first]()
    assert isinstance(get_handle(unet), kinds[first]) and get_handle(unet, second) is None
    apply[second]()
    handles = {name: get_handle(unet, name) for name in kinds}
    assert isinstance(get_handle(unet), ToMeHandle)
    both = denoise(unet, inputs)
    for other in (baseline, *alone.values()):
        assert not torch.equal(both, other)
    # Nothing of the other technique is shown.
    assert {row["calls"] for row in handles["tome"].stats()} == {6}
    assert handles["cache"].stats() == [
        {"region": "network", "computed": 6, "skipped": 3},
        {"region": "inner", "computed": 4, "skipped": 2},
    ]
    remove = dict(tome=remove_tome, cache=remove_cache)
    assert remove[first](unet) and not handles[first].active
    assert torch.equal(denoise(unet, inputs), alone[second])
    assert remove[second](unet)
    assert torch.equal(denoise(unet, inputs), baseline)
    with pytest.raises(ToMeError, match="'tome' or 'cache'"):
        get_handle(unet, "merging")


# --- several networks -----------------------------------------------------------------------------


def test_every_denoiser_of_a_pipeline_or_selected_ones(unet):
    pipeline = Pipeline(transformer=unet, transformer_2=copy.deepcopy(unet))
    handle = apply_tome(pipeline, ratio=0.5)
    assert list(handle.networks) == ["transformer", "transformer_2"] and handle.network is unet
    run(pipeline.transformer_2)
    rows = handle.stats()
    assert [row["calls"] for row in rows] == [0] * 3 + [1] * 3
    for start, row in zip(["transformer."] * 3 + ["transformer_2."] * 3, rows):
        assert row["target"].startswith(start) and row["block"].startswith(start)
    handle.ratio = 0.25
    assert get_handle(pipeline.transformer_2).ratio == 0.25
    apply_cache(pipeline, region="network")
    regions = [row["region"] for row in get_handle(pipeline, "cache").stats()]
    assert regions == ["transformer.network", "transformer_2.network"]
    assert remove_tome(pipeline) and remove_cache(pipeline)
    for apply in (apply_tome, apply_cache):
        handle = apply(pipeline, denoisers=["transformer_2"])
        assert handle.network is pipeline.transformer_2
        handle.remove()
        with pytest.raises(ToMeError, match="'transformer_3' selects no denoiser"):
            apply(pipeline, denoisers=["transformer_3"])
    assert not hooks_of(unet) and not hooks_of(pipeline.transformer_2)


def test_the_pipeline_s_scheduler_places_the_steps():
    case = PIPELINES["Stable Diffusion 1.x"]
    pipeline = case.pipeline()

    def image():
        return case.run(pipeline, num_inference_steps=4)

    baseline = image()
    # Steps remain 0.75, 0.5, 0.25, 0; by their timesteps (751 ...) only one would be below 0.5.
    with apply_tome(pipeline, ratio=dict(base=0.5, timestep=dict(timestep_range=(0, 0.5)))) as tome:
        assert not torch.equal(image(), baseline)
        assert {(row["calls"], row["unmerged_calls"]) for row in tome.stats()} == {(4, 2)}
    with apply_cache(pipeline, region="network", timestep_range=(0.25, 0.3)) as cache:
        assert not torch.equal(image(), baseline)
        assert cache.stats() == [{"region": "network", "computed": 3, "skipped": 1}]
    assert torch.equal(image(), baseline)
