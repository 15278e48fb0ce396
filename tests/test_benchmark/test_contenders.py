# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Contenders on copies with shared weights, each doing what its name says."""

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome.benchmark.contenders import prepare, share_weights
from mmagic_tome.benchmark.denoisers import DENOISER_MERGING
from mmagic_tome.settings import Setting


def run(network):
    with torch.no_grad():
        x = tiny_inputs()
        return network(x["sample"], x["timestep"], x["encoder_hidden_states"]).sample


def test_copies_share_weights_and_nothing_else():
    unet = tiny_unet()
    copy = share_weights(unet)
    assert all(a is b for a, b in zip(unet.parameters(), copy.parameters()))
    copy.register_forward_hook(lambda *_: None)
    assert not unet._forward_hooks and copy.conv_in is not unet.conv_in


def test_all_of_them():
    unet = tiny_unet()
    dense = run(unet)
    config = Setting.coerce({"ratio": 0.5})
    wide = Setting.coerce({"ratio": 0.25, "targets": ["attn", "mlp"]})
    wanted = ["dense", "ours", "tomesd", "ideal"]
    ready, missing = prepare(wanted, unet, DENOISER_MERGING, config, {"other": wide}, run)
    assert not missing
    named = {one.name: one for one in ready}
    assert list(named) == ["dense", "ours", "other", "tomesd", "ideal", "ideal for other"]
    assert named["tomesd"].ideal == named["ours"].ideal == "ideal"
    assert named["other"].ideal == "ideal for other"
    assert torch.equal(run(unet), dense) and torch.equal(run(named["dense"].network), dense)
    outputs = {name: run(one.network) for name, one in named.items()}
    for name in set(named) - {"dense"}:
        assert not torch.equal(outputs[name], dense), name
    # The ideal runs the targets of its merger on as many tokens, and no others.
    for name, kinds, kept in (
        ("ideal", ("attn1",), 128),
        ("ideal for other", ("attn1", "ff"), 192),
    ):
        block = named[name].network.down_blocks[0].attentions[0].transformer_blocks[0]
        seen = {}
        for kind in ("attn1", "attn2", "ff"):
            layer = getattr(block, kind)
            layer = layer.net[0].proj if kind == "ff" else layer.to_q
            layer.register_forward_pre_hook(
                lambda m, a, kind=kind, seen=seen: seen.__setitem__(kind, a[0].shape[1])
            )
        run(named[name].network)
        assert seen == {kind: kept if kind in kinds else 256 for kind in seen}


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        # Tokens that queries, keys of self-attention, and the feed-forward are given; of 256.
        (dict(targets=["attn_kv"]), (256, 128, 256)),
        (dict(method="todo"), (256, 64, 256)),
        (dict(targets="block"), (128, 128, 128)),
        (dict(targets="stack"), (128, 128, 128)),
        (dict(targets=["attn", "mlp"], ratio=0.25), (192, 192, 192)),
    ],
)
def test_the_ideal_works_on_as_many_tokens_as_ours(options, seen):
    ready, missing = prepare(
        ["ours", "ideal"],
        tiny_unet(),
        DENOISER_MERGING,
        Setting.coerce({"ratio": 0.5, **options}),
        {},
        run,
    )
    assert not missing
    for one in ready[1:]:
        block = one.network.down_blocks[0].attentions[0].transformer_blocks[0]
        found = []
        for layer in (block.attn1.to_q, block.attn1.to_k, block.ff.net[0].proj):
            layer.register_forward_pre_hook(lambda m, a, found=found: found.append(a[0].shape[1]))
        run(one.network)
        assert tuple(found) == seen, one.name


def test_a_contender_that_cannot_run_says_why():
    def broken(network):
        out = run(network)
        if network.__dict__.get("_tome_info") or hasattr(network, "_tome_info"):
            raise RuntimeError("no\nsuch  thing")
        return out

    wanted = ["dense", "tomesd", "ideal"]
    ready, missing = prepare(
        wanted, tiny_unet(), DENOISER_MERGING, Setting.coerce({"ratio": 0.5}), {}, broken
    )
    assert missing == {"tomesd": "RuntimeError: no such thing"}
    # The ideal is there without ours, too.
    assert [one.name for one in ready] == ["dense", "ideal"]


def test_a_network_without_an_adapter_runs_dense_only():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ready, missing = prepare(
        ["dense", "ours", "ideal"],
        network,
        DENOISER_MERGING,
        Setting.coerce({"ratio": 0.5}),
        {},
        lambda m: m(torch.ones(1, 4)),
    )
    assert [one.name for one in ready] == ["dense"]
    assert (
        "found no supported network in a Sequential" in missing["ours"]
        and "\n" not in missing["ours"]
    )


def test_mmagic_runs_on_its_own_unet_or_says_why():
    pytest.importorskip("mmagic")
    _, missing = prepare(
        ["mmagic"], tiny_unet(), DENOISER_MERGING, Setting.coerce({"ratio": 0.5}), {}, run
    )
    assert "encoder_attention_mask" in missing["mmagic"]
