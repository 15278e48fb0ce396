# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Contenders as both the benchmark and the evaluation spell and apply them."""

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeError
from mmagic_tome.contenders import apply_tomesd, parse_named, parse_options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ratio", "takes NAME="),
        ("={}", "takes NAME="),
        ("{'ratio': 0.5}", "takes NAME="),
        ("ours={}", "a name of your own"),
        ("a=3", "expected a dict"),
        ("a={ratio}", "expected a dict"),
        ("a={'ratio': 2}", "--tome a: "),
        ("a={'ration': 0.2}", "did you mean 'ratio'"),
        ("a={'cache': 'faast'}", "--tome a: .*'fast'"),
    ],
)
def test_bad_tome_options(text, said):
    with pytest.raises(ToMeError, match=said):
        parse_named(text, taken=("ours",))


def test_tome_options_in_both_spellings():
    expected = ("a", {"ratio": 0.6, "prop_attn": True, "cache": "fast"})
    assert parse_named("a={'ratio': 0.6, 'prop_attn': True, 'cache': 'fast'}") == expected
    assert parse_named('a={"ratio": 0.6, "prop_attn": true, "cache": "fast"}') == expected
    assert parse_options("[1, 2]") == [1, 2] and parse_options("a word") == "a word"


def test_tomesd_finds_the_network_in_a_wrapper():
    tomesd = pytest.importorskip("tomesd")

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = tiny_unet()

    model, inputs = Wrapped(), tiny_inputs()
    dense = model.unet(**inputs).sample
    # tomesd's block takes its input by place only.
    inputs = (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    patched = apply_tomesd(model, {"ratio": 0.5})
    assert patched is model.unet
    assert not torch.equal(patched(*inputs).sample, dense)
    tomesd.remove_patch(patched)
    assert torch.equal(patched(*inputs).sample, dense)
