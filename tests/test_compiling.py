# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Graphs of a merged network: how many, for which shapes, and exported ones."""

import io

import pytest
import torch
from tiny import tiny_inputs, tiny_unet
from tiny_pipelines import NETWORKS
from tiny_transformers import TRANSFORMERS

from mmagic_tome import apply_tome

PIXART = TRANSFORMERS["PixArt-alpha, PixArt-sigma"]


def unet():
    return tiny_unet(levels=1), [tiny_inputs(size=size) for size in ((16, 16), (12, 20))]


def transformer():
    inputs = [PIXART.inputs(grid) for grid in ((8, 8), (6, 10))]
    return PIXART.build(), inputs


@torch.no_grad()
def run(network, inputs):
    return network(**inputs, return_dict=False)[0]


def _tensors(output):
    """A ControlNet gives a list, one for every level."""
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("build", [unet, transformer])
def test_at_most_two_graphs_per_shape_and_the_same_picture(build, fresh):
    network, shapes = build()
    baseline = run(network, shapes[0])
    handle = apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, fullgraph=True, backend=count)
    for number, inputs in enumerate(shapes, start=1):
        for step in (0, 100):
            current = {**inputs, "timestep": inputs["timestep"] - step}
            expected = run(network, current)
            torch.testing.assert_close(run(compiled, current), expected, rtol=1e-4, atol=1e-5)
        assert len(graphs) <= 2 * number
        tokens = handle.stats()[0]["tokens"]
        assert {row["kept"] for row in handle.stats()} == {tokens // 2}
    assert not torch.allclose(run(compiled, shapes[0]), dense, atol=1e-2)
    assert 1 <= len(graphs) <= 2 * len(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("title", list(NETWORKS)[1:])
def test_other_unets_are_one_graph(title, fresh):
    """Those of Stable Diffusion are above."""
    network, inputs = NETWORKS[title].build(), NETWORKS[title].inputs()
    baseline = run(network, inputs)
    apply_tome(network, ratio=0.5)
    expected = run(network, inputs)
    assert NETWORKS[title].compiles == "the whole network"
    found = run(torch.compile(network, fullgraph=True, backend="eager"), inputs)
    torch.testing.assert_close(_tensors(found), _tensors(expected))
    # The last tensor is behind all blocks.
    assert not torch.allclose(_tensors(found)[-1], _tensors(dense)[-1], atol=1e-3)


@pytest.mark.slow
def test_an_exported_network_merges_at_every_timestep():
    network, (inputs, *_) = unet()
    baseline = run(network, inputs)
    apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    with torch.no_grad():
        program = torch.export.export(network, (), {**inputs, "return_dict": False}, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for step in (0, 100):
            current = {**inputs, "timestep": inputs["timestep"] - step}
            exported = loaded(**current, return_dict=False)[0]
            torch.testing.assert_close(exported, run(network, current))
    assert not torch.allclose(run(network, inputs), dense, atol=1e-2)


# --- what is carried from step to step ----------------------------------------------------------

STEPS = (900, 800, 700, 600, 500, 400, 300, 200, 100)
CARRIED = {
    "quality": dict(preset="quality"),
    "balanced, merged as well": dict(preset="balanced", ratio=0.5),
    "refresh": dict(ratio=0.5, plan_interval=2, targets=["attn", "mlp"]),
    "residual": dict(ratio=0.5, plan_interval=2, residual=dict(kind="exact", order=1)),
    "blocks left out": dict(targets="block", plan_interval=2, residual="reuse"),
    "ratio by noise": dict(ratio=dict(base=0.5, noise=dict(between=(0.3, 0.8)))),
}


def denoise(network, inputs):
    outputs = [run(network, {**inputs, "timestep": torch.tensor(step)}) for step in STEPS]
    return torch.stack(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("title", CARRIED)
def test_steps_differ_and_no_step_of_a_second_run_is_compiled_again(title, fresh):
    network, (inputs, _) = tiny_unet(levels=2), [tiny_inputs(size=(16, 16)), None]
    dense = denoise(network, inputs)
    apply_tome(network, **CARRIED[title])
    expected = denoise(network, inputs)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=count)
    torch.testing.assert_close(denoise(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
    first = len(graphs)
    torch.testing.assert_close(denoise(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
    assert first == len(graphs)
    assert first > 0
    assert not torch.allclose(expected, dense, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_presets_around_blocks_that_are_compiled_without_a_break(preset, fresh):
    network, inputs = tiny_unet(levels=2), tiny_inputs(size=(16, 16))
    handle = apply_tome(network, preset=preset)
    expected = denoise(network, inputs)
    network.compile_repeated_blocks(fullgraph=True, backend="eager")
    handle.reset()
    torch.testing.assert_close(denoise(network, inputs), expected)
    assert all(row["reused"] for row in handle.scopes())


@pytest.mark.slow
def test_one_graph_of_what_is_decided_by_the_step_is_refused_with_the_reason(fresh):
    network, inputs = tiny_unet(levels=1), tiny_inputs(size=(16, 16))
    apply_tome(network, ratio=0.5, plan_interval=2)
    with pytest.raises(Exception, match="write fullgraph=False"):
        run(torch.compile(network, fullgraph=True, backend="eager"), inputs)


# --- one graph ---

@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()


@pytest.fixture
def small():
    """One level: tracing is what takes the time in the tests below."""
    return tiny_unet(levels=1)


def test_apply_and_remove_after_compiling(small, compiler):
    unet = small
    baseline = run(unet)
    compiled = compiler(unet)
    assert torch.equal(run(compiled), baseline)
    handle = apply_tome(compiled, ratio=0.5)
    merged = run(unet)
    assert not torch.equal(merged, baseline)
    assert torch.equal(run(compiled), merged)
    handle.remove()
    assert torch.equal(run(compiled), baseline)
    handle = apply_tome(compiled, ratio=0.5)
    assert torch.equal(run(compiled), merged)
    handle.ratio = 0
    assert torch.equal(run(compiled), baseline)


def test_a_compiled_dense_copy_does_not_serve_the_merged_one(small, compiler):
    unet = small
    clone = copy.deepcopy(unet)
    baseline = run(unet)
    apply_tome(clone, ratio=0.5)
    merged = run(clone)
    assert torch.equal(run(compiler(unet)), baseline)
    assert torch.equal(run(compiler(clone)), merged)
    assert torch.equal(run(compiler(unet)), baseline)


def test_blocks_compiled_on_their_own(small, compiler):
    unet = small
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    expected = run(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(run(unet), expected)


def test_one_graph_without_breaks(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    expected = run(unet)
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(unet, fullgraph=True, backend=count)
    for step in (500, 499, 498, 500):
        out = run(compiled, timestep=torch.tensor(step))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2
    assert {row["kept"] for row in get_handle(compiled).stats()} == {128, 32, 8}
    torch._dynamo.reset()


