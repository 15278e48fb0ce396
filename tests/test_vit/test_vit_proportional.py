# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Proportional attention without a mask, as a GPU gets it."""

import pytest
import torch
import torch.nn.functional as F
from vits import BIASES, build, inputs, result

from mmagic_tome.merging import proportional
from mmagic_tome.vit import apply_tome_vit


def choose(monkeypatch, channels):
    monkeypatch.setattr(proportional, "prefers_channels", lambda query: channels)


@pytest.mark.parametrize("name", BIASES)
def test_channels_do_what_the_mask_does_with_gradients(name, monkeypatch):
    model, arguments = build(name, "sdpa").double(), inputs(name)
    arguments = {key: x.double() for key, x in arguments.items()}
    apply_tome_vit(model, r=6)
    found = []
    for channels in (False, True):
        choose(monkeypatch, channels)
        model.zero_grad()
        with torch.enable_grad():
            output = result(model, arguments)
            output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", BIASES)
def test_one_graph_without_a_mask(name, monkeypatch):
    torch._dynamo.reset()
    choose(monkeypatch, True)
    masks = []

    def backend(graph, example_inputs):
        nodes = graph.graph.nodes
        attention = [one for one in nodes if one.target is F.scaled_dot_product_attention]
        masks.extend(node.kwargs.get("attn_mask") for node in attention)
        return graph.forward

    model, arguments = build(name, "sdpa"), inputs(name)
    apply_tome_vit(model, r=6)
    expected = result(model, arguments)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(result(compiled, arguments), expected, rtol=1e-4, atol=1e-4)
    assert masks and not any(masks)
    torch._dynamo.reset()


def test_attention_that_is_written_out_adds_the_mask(monkeypatch):
    choose(monkeypatch, True)
    found = []
    for attention in ("sdpa", "eager"):
        model, arguments = build("vit", attention), inputs("vit")
        apply_tome_vit(model, r=6)
        found.append(result(model, arguments))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
