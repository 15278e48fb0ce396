# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merged vision transformers under torch.compile."""

import pytest
import torch
import vits
from vits import BIASES, NAMES, build, inputs, result, tiny_timm

from mmagic_tome.vit import apply_tome_vit


@pytest.fixture(autouse=True)
def _compiler_anew(monkeypatch):
    """Two layers, since every one is traced, and Dynamo without memory: it gives up on a function
    that it has compiled eight times, for whatever model."""
    monkeypatch.setattr(vits, "LAYERS", 2)
    for sizes in (vits._SIZE, vits._IMAGE):
        monkeypatch.setitem(sizes, "num_hidden_layers", 2)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    model, arguments = build(name), inputs(name)
    dense = result(model, arguments)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    handle = apply_tome_vit(model, r=6, trace_source=True)
    merged = result(model, arguments)
    assert not torch.allclose(merged, dense, rtol=1e-3)
    size, source = handle.size.clone(), handle.source.clone()
    handle.size.zero_()
    handle.source.zero_()
    torch.testing.assert_close(result(compiled, arguments), merged, rtol=1e-4, atol=1e-4)
    assert torch.equal(handle.size, size) and torch.equal(handle.source, source)
    if name in BIASES:  # one of every kind of attention: this is another graph
        with handle.disabled():
            torch.testing.assert_close(result(compiled, arguments), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_compiled_model_for_sizes_gradients_and_a_target():
    model = tiny_timm(dynamic_img_size=True)
    handle = apply_tome_vit(model, target_speedup=1.5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for side in (24, 32, 40, 24):
        x = torch.randn(2, 3, side, side)
        expected = model(x)
        tokens = handle.tokens
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        assert handle.tokens == tokens
    handle.r = 5
    with torch.enable_grad():
        gradients = []
        for call in (model, compiled):
            model.zero_grad()
            call(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, graph in zip(*gradients):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)
