# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Applying and removing, and what a model is afterwards."""

import copy
import io
import pickle
import threading

import pytest
import torch
from tiny import tiny_inputs, tiny_unet
from torch import nn

from mmagic_tome import (
    ToMeError,
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
    unet.load_state_dict(original.state_dict(), strict=True)
    assert run(unet).isfinite().all()


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


def test_no_site_of_the_wanted_kind():
    network = tiny_unet(
        levels=2, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    network.mid_block = None
    with pytest.raises(ToMeError, match="no transformer block") as error:
        apply_tome(network)
    for text in ("UNet2DConditionModel", "whatever has down_blocks", "docs/adding_a_model.md"):
        assert text in str(error.value)
    network = tiny_unet(levels=1)
    for block in network.modules():
        if hasattr(block, "attn2"):
            block.attn2 = None
    with pytest.raises(ToMeError, match=r"of kind crossattn, .* have attn, attn_kv, mlp"):
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
    wrong = []

    def work(index):
        for _ in range(5):
            if not torch.equal(run(networks[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_network_in_two_threads(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    calls = [tiny_inputs(size=16), {**tiny_inputs(size=24), "timestep": torch.tensor(3)}]
    expected = [run(unet, **call) for call in calls]
    wrong = []

    def work(index):
        for _ in range(8):
            try:
                if not torch.equal(run(unet, **calls[index]), expected[index]):
                    wrong.append(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


