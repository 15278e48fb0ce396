# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Graphs of a merged network: how many, for which shapes, and exported ones."""

import copy
import io

import pytest
import torch
from denoise import denoise
from tiny import tiny_inputs, tiny_unet
from tiny_pipelines import NETWORKS
from tiny_transformers import TRANSFORMERS

from mmagic_tome import apply_cache, apply_tome
from mmagic_tome.cache import PRESETS

PIXART = TRANSFORMERS["PixArt-alpha, PixArt-sigma"]
EVERYTHING = dict(max_downsample=8, targets=["attn", "crossattn", "mlp"])


def unet():
    return tiny_unet(levels=1), [tiny_inputs(size=size) for size in ((16, 16), (12, 20))]


def transformer():
    inputs = [PIXART.inputs(grid) for grid in ((8, 8), (6, 10))]
    return PIXART.build(), inputs


@torch.no_grad()
def run(network, inputs=None):
    inputs = tiny_inputs() if inputs is None else inputs
    return network(**inputs, return_dict=False)[0]


def _tensors(output):
    """A ControlNet returns a list, one tensor per level."""
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("build", [unet, transformer])
def test_at_most_two_graphs_per_shape_and_the_same_image(build, fresh):
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
    assert not torch.allclose(run(compiled, shapes[0]), baseline, atol=1e-2)
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
    assert not torch.allclose(_tensors(found)[-1], _tensors(baseline)[-1], atol=1e-3)


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
    assert not torch.allclose(run(network, inputs), baseline, atol=1e-2)


# --- state kept between steps ---------------------------------------------------------------------

STEPS = {
    "balanced, merged as well": dict(cache="balanced", ratio=0.5),
    "plan_interval": dict(ratio=0.5, plan_interval=2, targets=["attn", "mlp"]),
    "residual": dict(ratio=0.5, plan_interval=2, residual=True),
    "residual of blocks": dict(targets="block", plan_interval=2, residual=True),
    "ratio by timestep": dict(ratio=dict(base=0.5, timestep=dict(timestep_range=(0.3, 0.8)))),
}


@pytest.mark.slow
@pytest.mark.parametrize("title", STEPS)
def test_steps_differ_and_no_step_of_a_second_run_is_compiled_again(title, fresh):
    network, inputs = tiny_unet(levels=2), tiny_inputs()
    baseline = denoise(network, inputs)
    options = dict(STEPS[title])
    if "cache" in options:
        apply_cache(network, options.pop("cache"))
    if options:
        apply_tome(network, **options)
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
    assert not torch.allclose(expected, baseline, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_caches_around_blocks_that_are_compiled_without_a_break(name, fresh):
    network, inputs = tiny_unet(levels=2), tiny_inputs()
    handle = apply_cache(network, name)
    expected = denoise(network, inputs)
    network.compile_repeated_blocks(fullgraph=True, backend="eager")
    handle.reset_stats()
    torch.testing.assert_close(denoise(network, inputs), expected)
    assert all(row["skipped"] for row in handle.stats())


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(plan_interval=2), dict(plan_interval=2, residual=True)])
def test_merging_by_step_around_blocks_that_are_compiled(options, fresh):
    network, inputs = tiny_unet(levels=1), tiny_inputs()
    handle = apply_tome(network, **options)
    expected = denoise(network, inputs)
    network.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(denoise(network, inputs), expected)
    assert {row["plans"] for row in handle.stats()} == {2 * 5}


@pytest.mark.slow
@pytest.mark.parametrize("apply", [lambda n: apply_tome(n, plan_interval=2), apply_cache])
def test_one_graph_of_what_is_decided_by_the_step_is_refused_with_the_reason(apply, fresh):
    network, inputs = tiny_unet(levels=2), tiny_inputs()
    apply(network)
    with pytest.raises(Exception, match="write fullgraph=False"):
        run(torch.compile(network, fullgraph=True, backend="eager"), inputs)


# --- applying and removing ------------------------------------------------------------------------


@pytest.fixture
def compiler(fresh):
    return lambda model: torch.compile(model, fullgraph=True, backend="eager")


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


def test_a_compiled_baseline_copy_does_not_serve_the_merged_one(small, compiler):
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
    apply_tome(unet, **EVERYTHING)
    expected = run(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(run(unet), expected)


@pytest.mark.parametrize("options", [{}, dict(targets="stack", share_plans=True)])
def test_one_graph_without_breaks(options, fresh):
    unet = tiny_unet(levels=3)
    handle = apply_tome(unet, **{**EVERYTHING, **options})
    expected = run(unet)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(unet, fullgraph=True, backend=count)
    for step in (500, 499, 498, 500):
        out = run(compiled, {**tiny_inputs(), "timestep": torch.tensor(step)})
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2
    assert {row["kept"] for row in handle.stats()} == {128, 32, 8}


@pytest.mark.slow
def test_caching_and_removing_after_compiling(fresh):
    unet, inputs, steps = tiny_unet(levels=2), tiny_inputs(), (900, 800, 700, 600)
    baseline = denoise(unet, inputs, steps)
    compiled = torch.compile(unet, backend="eager")
    assert torch.equal(denoise(compiled, inputs, steps), baseline)
    handle = apply_cache(compiled, [dict(region="network"), dict(region="inner")])
    expected = denoise(unet, inputs, steps)
    assert not torch.equal(expected, baseline)
    handle.reset_stats()
    assert torch.equal(denoise(compiled, inputs, steps), expected)
    assert handle.stats()[0]["skipped"] == 1
    handle.remove()
    assert torch.equal(denoise(compiled, inputs, steps), baseline)
