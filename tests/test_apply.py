# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Applying and removing, and what a model is afterwards."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from denoise import denoise
from tiny import tiny_inputs, tiny_pipeline, tiny_unet
from tiny_pipelines import tiny_controlnet
from torch import nn

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


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=3)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


@torch.no_grad()
def run(unet, **changes):
    return unet(**{**tiny_inputs(), **changes}).sample


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_ratio_zero_and_removal_are_bit_exact(unet, options):
    baseline = run(unet)
    handle = apply_tome(unet, ratio=0, **options)
    assert torch.equal(run(unet), baseline)
    handle.ratio = 0.5
    assert not torch.equal(run(unet), baseline)
    handle.ratio = 0
    assert torch.equal(run(unet), baseline)
    handle.ratio = 0.5
    handle.remove()
    assert torch.equal(run(unet), baseline)
    assert not handle.active and get_handle(unet) is None
    handle.remove()  # a second time is harmless


def hooks_of(module):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    return [hook for pair in tables for table in pair for hook in table.values()]


def test_nothing_but_hooks_is_added_and_none_is_left(unet):
    keys, classes = list(unet.state_dict()), [type(m) for m in unet.modules()]
    attributes = [set(vars(m)) for m in unet.modules()]
    apply_tome(unet, **EVERYTHING)
    run(unet)
    assert list(unet.state_dict()) == keys
    assert [type(m) for m in unet.modules()] == classes
    assert [set(vars(m)) for m in unet.modules()] == attributes
    assert hooks_of(unet)
    assert remove_tome(unet) and not hooks_of(unet)
    assert not remove_tome(unet)
    for module in unet.modules():
        assert not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs


def test_hooks_of_others_stay(unet):
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    apply_tome(unet).remove()
    run(unet)
    assert calls == [1]


def test_applying_twice_replaces(unet):
    first = apply_tome(unet, ratio=0.25)
    second = apply_tome(unet, ratio=0.5)
    assert not first.active and second.active
    run(unet)
    assert {row["kept"] for row in second.stats()} == {128}
    first.remove()  # must not touch the second
    assert get_handle(unet).ratio == 0.5


def test_a_failed_apply_leaves_what_was_there(unet):
    apply_tome(unet, ratio=0.25)
    for options in (dict(ratio=0.9), dict(ratio=0.5, foo=1)):
        with pytest.raises(ToMeError):
            apply_tome(unet, **options)
        assert get_handle(unet).ratio == 0.25


def test_deepcopy_is_independent(unet):
    handle = apply_tome(unet, ratio=0.5)
    expected = run(unet)
    clone = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(run(clone), expected)
    run(clone)
    assert get_handle(clone).stats()[0]["calls"] == handle.stats()[0]["calls"] + 2
    get_handle(clone).ratio = 0
    assert handle.ratio == 0.5 and torch.equal(run(unet), expected)
    assert remove_tome(clone) and not hooks_of(clone)
    assert handle.active and torch.equal(run(unet), expected)


def test_pickle_and_torch_save(unet):
    baseline = run(unet)
    apply_tome(unet, ratio=0.5)
    expected = run(unet)
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    for copied in (
        pickle.loads(pickle.dumps(unet)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(run(copied), expected)
        assert get_handle(copied).ratio == 0.5
        assert remove_tome(copied) and torch.equal(run(copied), baseline)


def test_state_dict_loads_into_a_patched_model(unet, original):
    apply_tome(unet, ratio=0.5)
    apply_cache(unet)
    expected = run(unet)
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    assert not torch.equal(run(unet), expected)
    unet.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(run(unet), expected)


def test_wrappers_are_looked_through(unet):
    class Pipeline:
        def __init__(self, unet):
            self.unet = unet

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    for model in (Pipeline(unet), Wrapper(unet), Pipeline(Wrapper(unet))):
        handle = apply_tome(model, ratio=0.5)
        assert handle.network is unet
        assert get_handle(model).ratio == 0.5
        assert remove_tome(model)


def test_compiled_wrapper_is_looked_through(unet):
    assert apply_tome(torch.compile(unet, backend="eager")).network is unet


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "stable-diffusion", None, 3])
def test_unknown_models_get_an_error_that_names_them(model):
    with pytest.raises(ToMeError, match=f"found no supported network in a {type(model).__name__}"):
        apply_tome(model)
    assert get_handle(model) is None and remove_tome(model) is False


def test_max_downsample_auto_is_the_finest_level_with_blocks():
    network = tiny_unet(
        levels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # like SDXL: no attention at the finest level
    handle = apply_tome(network, ratio=0.5)
    assert {row["downsample"] for row in handle.stats()} == {2}
    run(network)
    assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(64, 32)}
    with pytest.raises(ToMeError) as error:
        apply_tome(network, max_downsample=1)
    for text in ("max_downsample=1", "2 (3 blocks)", "4 (", "Write max_downsample=2 or 'auto'"):
        assert text in str(error.value)


def test_no_target_of_the_wanted_kind():
    network = tiny_unet(
        levels=2, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    network.mid_block = None
    with pytest.raises(ToMeError, match="no transformer block") as error:
        apply_tome(network)
    for text in (
        "UNet2DConditionModel",
        "with down_blocks and up_blocks",
        "docs/adding_a_model.md",
    ):
        assert text in str(error.value)
    network = tiny_unet(levels=1)
    for block in network.modules():
        if hasattr(block, "attn2"):
            block.attn2 = None
    with pytest.raises(ToMeError, match=r"a target crossattn, .* have attn, attn_kv, mlp"):
        apply_tome(network, targets=["crossattn"])


def test_exception_in_mid_forward_leaves_the_model_usable(unet):
    apply_tome(unet, ratio=0.5)
    expected = run(unet)
    block = unet.up_blocks[-1]

    def fail(*_):
        raise RuntimeError("out of memory, say")

    hook = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(unet, **tiny_inputs(size=32))
    hook.remove()
    assert torch.equal(run(unet), expected)


def test_two_models_in_two_threads(unet):
    networks = [unet, copy.deepcopy(unet)]
    apply_tome(networks[0], ratio=0.25)
    apply_tome(networks[1], ratio=0.5)
    expected = [run(network) for network in networks]
    assert not torch.equal(*expected)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda network: [run(network) for _ in range(5)], networks))
    for outputs, one in zip(found, expected):
        assert all(torch.equal(output, one) for output in outputs)


def test_one_network_in_two_threads(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    calls = [tiny_inputs(size=16), {**tiny_inputs(size=24), "timestep": torch.tensor(3)}]
    expected = [run(unet, **call) for call in calls]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda call: [run(unet, **call) for _ in range(8)], calls))
    for outputs, one in zip(found, expected):
        assert all(torch.equal(output, one) for output in outputs)


# --- step caching ---------------------------------------------------------------------------------

BOTH = [dict(region="network"), dict(region="inner")]


def test_caching_adds_no_hooks_and_keeps_classes_by_name(unet):
    keys, classes = list(unet.state_dict()), [type(m) for m in unet.modules()]
    attributes = [set(vars(m)) for m in unet.modules()]
    apply_cache(unet, BOTH)
    assert not hooks_of(unet) and list(unet.state_dict()) == keys
    intercepted = [type(m) for m in unet.modules()]
    assert intercepted != classes
    assert [cls.__name__ for cls in intercepted] == [cls.__name__ for cls in classes]
    assert all(issubclass(one, plain) for one, plain in zip(intercepted, classes))
    assert remove_cache(unet) and not remove_cache(unet)
    assert [type(m) for m in unet.modules()] == classes
    assert [set(vars(m)) for m in unet.modules()] == attributes


@pytest.mark.parametrize("first", ["tome", "cache"])
def test_both_techniques_are_applied_and_removed_apart(unet, first):
    inputs = tiny_inputs()
    baseline = denoise(unet, inputs)
    with apply_tome(unet):
        merged = denoise(unet, inputs)
    with apply_cache(unet, BOTH):
        cached = denoise(unet, inputs)
    apply = dict(tome=lambda: apply_tome(unet), cache=lambda: apply_cache(unet, BOTH))
    handles = {name: apply[name]() for name in (first, *({"tome", "cache"} - {first}))}
    both = denoise(unet, inputs)
    for other in (baseline, merged, cached):
        assert not torch.equal(both, other)
    # Nothing of the other technique is shown.
    assert {row["calls"] for row in handles["tome"].stats()} == {6}
    assert handles["cache"].stats() == [
        {"region": "network", "computed": 6, "skipped": 3},
        {"region": "inner", "computed": 4, "skipped": 2},
    ]
    remove = dict(tome=remove_tome, cache=remove_cache)
    left = dict(tome=cached, cache=merged)
    assert remove[first](unet) and not handles[first].active
    assert torch.equal(denoise(unet, inputs), left[first])
    apply[first]()
    assert torch.equal(denoise(unet, inputs), both)
    assert remove_tome(unet) and remove_cache(unet)
    assert torch.equal(denoise(unet, inputs), baseline)


def test_get_handle_by_technique(unet):
    assert [get_handle(unet, one) for one in (None, "tome", "cache")] == [None] * 3
    apply_cache(unet)
    assert isinstance(get_handle(unet), CacheHandle) and get_handle(unet, "tome") is None
    apply_tome(unet)
    assert isinstance(get_handle(unet), ToMeHandle)
    assert isinstance(get_handle(unet, "tome"), ToMeHandle)
    assert isinstance(get_handle(unet, "cache"), CacheHandle)
    with pytest.raises(ToMeError, match="'tome' or 'cache'"):
        get_handle(unet, "merging")


def test_a_failed_apply_cache_leaves_what_was_there(unet):
    apply_cache(unet, interval=3)
    for options in (dict(interval=1), dict(region="inner", num_outer_blocks=3), dict(foo=1)):
        with pytest.raises(ToMeError):
            apply_cache(unet, **options)
        assert get_handle(unet).config[0].interval == 3
    with pytest.raises(ToMeError, match="found no supported network in a Linear"):
        apply_cache(nn.Linear(2, 2))


# --- several networks -----------------------------------------------------------------------------


class Pipeline:
    def __init__(self, **parts):
        vars(self).update(parts)


def test_every_denoiser_of_a_pipeline(unet):
    pipeline = Pipeline(transformer=unet, transformer_2=copy.deepcopy(unet))
    handle = apply_tome(pipeline, ratio=0.5)
    assert list(handle.networks) == ["transformer", "transformer_2"]
    assert handle.network is unet
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
    assert not hooks_of(unet) and not hooks_of(pipeline.transformer_2)


def test_selected_denoisers_of_a_pipeline(unet):
    pipeline = Pipeline(transformer=unet, transformer_2=copy.deepcopy(unet))
    for apply in (apply_tome, apply_cache):
        handle = apply(pipeline, denoisers=["transformer_2"])
        assert handle.network is pipeline.transformer_2
        handle.remove()
        with pytest.raises(ToMeError, match="'transformer_3' selects no denoiser"):
            apply(pipeline, denoisers=["transformer_3"])
    assert not hooks_of(unet)


def test_a_denoiser_with_nothing_to_merge_stays_as_it_is_with_a_warning(unet):
    other = tiny_unet(2, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    other.mid_block = None
    with pytest.warns(UserWarning, match="'prior' stays as it is.*no transformer block"):
        handle = apply_tome(Pipeline(unet=unet, prior=other))
    assert handle.networks == {"unet": unet} and not hooks_of(other)


def test_a_controlnet_beside_the_network(unet):
    pipeline = Pipeline(unet=unet, controlnet=tiny_controlnet())
    handle = apply_tome(pipeline, ratio=0.5)
    assert list(handle.networks) == [""]
    handle = apply_tome(pipeline, ratio=0.5, controlnet=dict(ratio=0.25))
    assert list(handle.networks) == ["", "controlnet"]
    assert any(row["target"].startswith("controlnet.down_blocks.0") for row in handle.stats())
    assert get_handle(pipeline.controlnet).ratio == 0.25
    handle = apply_cache(pipeline, BOTH)
    regions = [row["region"] for row in handle.stats()]
    assert regions == ["network", "inner", "controlnet.network"]
    regions = [row["region"] for row in apply_cache(pipeline, BOTH, controlnet=False).stats()]
    assert regions == ["network", "inner"]
    assert get_handle(pipeline.controlnet, "cache") is None
    with pytest.raises(ToMeError, match="asks for a ControlNet"):
        apply_tome(unet, controlnet=True)


def test_the_pipeline_s_scheduler_places_the_steps(sd_folder):
    pipeline = tiny_pipeline(sd_folder)
    call = dict(prompt="a cat", height=64, width=64, output_type="latent", num_inference_steps=4)

    def image():
        return pipeline(**call, generator=torch.Generator().manual_seed(0)).images

    baseline = image()
    # Steps remain 0.75, 0.5, 0.25, 0; by their timesteps (751 ...) only one would be below 0.5.
    with apply_tome(pipeline, ratio=dict(base=0.5, timestep=dict(timestep_range=(0, 0.5)))) as tome:
        assert not torch.equal(image(), baseline)
        assert {(row["calls"], row["unmerged_calls"]) for row in tome.stats()} == {(4, 2)}
    with apply_cache(pipeline, region="network", timestep_range=(0.25, 0.3)) as cache:
        assert not torch.equal(image(), baseline)
        assert cache.stats() == [{"region": "network", "computed": 3, "skipped": 1}]
    assert torch.equal(image(), baseline)
