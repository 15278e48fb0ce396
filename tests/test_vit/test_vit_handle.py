# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options, handles and errors of token merging in vision transformers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from vits import BIASES, LAYERS, build, inputs, result, tiny_timm

from mmagic_tome import ToMeConfig, ToMeError, apply_tome, get_handle, remove_tome
from mmagic_tome.vit import (
    ViTConfig,
    ViTHandle,
    apply_tome_vit,
    find_vit,
    get_vit_handle,
)
from mmagic_tome.vit.config import relative_cost


def test_config_checks_like_the_function():
    assert ViTConfig().r == 8 and ViTConfig(target_speedup=1.5).r is None
    config = ViTConfig(r=(3, -1.0), metric="values")
    # r and target_speedup replace each other.
    fast = config.replace(target_speedup=2)
    assert (fast.r, fast.target_speedup) == (None, 2) and fast.metric == "values"
    assert (fast.replace(r=5).r, fast.replace(r=5).target_speedup) == (5, None)
    assert ViTConfig(**fast.to_dict()) == fast
    for wrong in (3, ToMeConfig()):
        with pytest.raises(ToMeError, match=r"a dict such as dict\(r=8\) or a ViTConfig"):
            apply_tome(build("vit"), wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=-1), "r must be an integer >= 0"),
        (dict(r="8"), "r must be an integer >= 0"),
        (dict(r=[1] * 5), "r has 5 entries but the model has 4 blocks"),
        (dict(r=True), "r must be an integer >= 0"),
        (dict(r=[1.0]), "r must be an integer >= 0"),
        (dict(r=(1, 2, 3)), r"r as a tuple is \(r, inflect\)"),
        (dict(r=(8, 1.5)), r"inflect in r=\(r, inflect\) must be in \[-1, 1\], got 1.5"),
        (dict(metric="key"), "metric='key' must be one of keys, .*; write metric='keys'"),
        (dict(distance="l1"), "distance='l1' must be one of"),
        (dict(prop_attn=1), "prop_attn=1 must be True or False; write prop_attn=True"),
        (dict(unmerge="last"), "unmerge='last' must be True or False"),
        (dict(seed=-1), "seed=-1 must be an integer at least 0; write seed=0"),
        (dict(target_speedup=0.5), "target_speedup=0.5 must be a number at least 1; write"),
        (dict(r=3, target_speedup=2), "r and target_speedup exclude each other"),
        (dict(metrics="keys"), "no option 'metrics': did you mean 'metric'"),
        (dict(r=6, ratio=0.5), r"has no option 'ratio'.* diffusion models; write r=8"),
    ],
)
def test_wrong_options_change_nothing(options, message):
    model = build("vit")
    for apply in (apply_tome_vit, apply_tome):
        with pytest.raises(ToMeError, match=message):
            apply(model, **options)
    with pytest.raises(ToMeError, match=message):
        apply_tome_vit(model, ViTConfig().replace(**options))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_handle_by_the_general_functions():
    model, arguments = build("vit"), inputs("vit")
    dense = result(model, arguments)
    assert get_handle(model) is None and not remove_tome(model)
    first = apply_tome(model, dict(r=3, distance="dot"), r=(4, -1.0))
    assert isinstance(first, ViTHandle) and get_handle(model).config == first.config
    assert first.network is model.vit and first.config.distance == "dot"
    assert first.stats()[0] == {"block": "vit.layers.0", "tokens": None, "kept": None}
    assert "not run yet" in first.summary() and first.tokens is None
    result(model, arguments)
    assert [a - b for a, b in first.tokens] == [8, 5, 3, 0]
    assert first.stats()[1] == {"block": "vit.layers.1", "tokens": 29, "kept": 24}
    assert first.description == "r=(4, -1.0), proportional attention, dot similarity of keys"
    lines = first.summary().splitlines()
    assert first.description in lines[0] and lines[4].split() == ["vit.layers.1", "29", "24"]
    again = apply_tome(model, r=2)
    assert not first.active and again.active and "removed" in first.summary()
    with pytest.raises(ToMeError, match="removed or replaced"):
        first.r = 1
    # A change takes effect at the next forward.
    change = (
        find_vit(model)
        .blocks[1]
        .module.register_forward_pre_hook(lambda module, args: setattr(again, "r", 6))
    )
    result(model, arguments)
    assert [a - b for a, b in again.tokens] == [2] * 4 and again.r == 6
    change.remove()
    result(model, arguments)
    assert [a - b for a, b in again.tokens] == [6] * 4
    again.reset_stats()
    assert again.tokens is again.size is again.source is None
    assert remove_tome(model) and torch.equal(result(model, arguments), dense)
    assert get_vit_handle(model) is None


@pytest.mark.parametrize("name", BIASES)
def test_disabled_is_of_one_thread_and_with_puts_back_what_was_before(name):
    model, arguments = build(name), inputs(name)

    @torch.no_grad()
    def output():
        return result(model, arguments)

    baseline = output()
    handle = apply_tome_vit(model, r=5)
    merged, tokens = output(), handle.tokens
    with ThreadPoolExecutor(1) as thread, handle.disabled():
        assert torch.equal(thread.submit(output).result(), merged)
        assert torch.equal(output(), baseline)
        assert handle.active and handle.tokens == tokens and handle.r == 5
    assert torch.equal(output(), merged)
    with apply_tome_vit(model, r=2) as inner:
        assert inner.active and not handle.active and not torch.equal(output(), merged)
    assert handle.active and not inner.active and torch.equal(output(), merged)


def test_target_speedup_counts_operations():
    model, arguments = build("vit"), inputs("vit")
    handle = apply_tome_vit(model, target_speedup=1.5)
    result(model, arguments)
    dense = relative_cost([(37, 37)] * LAYERS, 32, 48)
    r = handle.tokens[0][0] - handle.tokens[0][1]
    assert handle.r == r and f"target_speedup=1.5 of the multiply-adds, r={r}" in handle.summary()
    assert dense / relative_cost(handle.tokens, 32, 48) >= 1.5
    assert apply_tome_vit(model, target_speedup=50).r is None
    with pytest.raises(ToMeError, match="target_speedup=50 is out of reach with 37 tokens"):
        result(model, arguments)


def test_models_that_cannot_be_merged():
    from timm.models.eva import Eva
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import ParallelScalingBlock

    sizes = dict(img_size=8, patch_size=4, embed_dim=8)
    rotary = Eva(**sizes, depth=1, num_heads=1)
    windows = SwinTransformer(**sizes, depths=(1,), num_heads=(1,))
    pair = torch.nn.ModuleList([build("vit"), build("clip")])
    for model, said in (
        (torch.nn.Linear(2, 2), r"to merge in a Linear.*timm.*write ratio in place"),
        (rotary, r"merge in a Eva. Eva rotates queries and keys by pos"),
        (torch.nn.Sequential(windows), r"Sequential. SwinTransformer attends in windows"),
        (pair, r"2 vision transformers in a ModuleList: '0.vit', '1.vision_model'"),
        (tiny_timm(block_fn=ParallelScalingBlock), r"blocks.0 is a ParallelScalingBlock"),
    ):
        with pytest.raises(ToMeError, match=said):
            apply_tome_vit(model, r=1)


def test_calls_that_cannot_be_merged():
    model, arguments = build("vit"), inputs("vit")
    handle = apply_tome_vit(model, r=2)
    mask = torch.ones(2, 37)
    mask[:, -5:] = 0
    with pytest.raises(ToMeError, match=r"vit.layers.0 was given an attention mask"):
        model.vit(**arguments, attention_mask=mask)
    model.vit.layers[0].attention.config._attn_implementation = "flex_attention"
    # The layer alone: transformers compiles a mask of it for the whole model.
    with pytest.raises(ToMeError, match=r"needs an additive mask.*'flex_attention'"):
        model.vit.layers[0](torch.randn(2, 37, 32))
    assert handle.active
    model, arguments = build("timm"), inputs("timm")
    apply_tome_vit(model, r=2)
    mask = torch.ones(37, 37, dtype=torch.bool)
    for what, given in (
        ("an attention", dict(attn_mask=mask)),
        ("is_causal", dict(is_causal=True)),
    ):
        with pytest.raises(ToMeError, match=rf"blocks.0 was given {what}"):
            model(**arguments, **given)
    # Blocks that are skipped at random.
    model, arguments = build("whisper"), inputs("whisper")
    dense = result(model, arguments)
    handle = apply_tome_vit(model, r=3)
    model.encoder.layerdrop = 0.5
    result(model, arguments)  # none is skipped in eval mode
    model.train()
    with pytest.raises(ToMeError, match=r"skips blocks at random.*layerdrop=0.5.*r=0"):
        result(model, arguments)
    handle.r, model.encoder.layerdrop = 0, 0.0
    assert torch.equal(result(model, arguments), dense)
