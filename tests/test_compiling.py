# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Graphs of a patched network: how many, for which shapes, and exported ones."""

import copy
import io

import pytest
import torch
from denoise import denoise
from fixed_steps import FIXED
from tiny import tiny_inputs, tiny_unet
from tiny_transformers import TRANSFORMERS
from tiny_unets import NETWORKS

from mmagic_tome import apply_cache, apply_tome
from mmagic_tome.graphs import eager_only, prepare_compiler

PIXART = TRANSFORMERS["PixArt-alpha, PixArt-sigma"]
TARGETS = dict(ratio=0.5, targets=["attn", "mlp"])
# A ratio that does not depend on the step.
BY_LEVEL = dict(downsample={1: 0.5, 2: 0.5})
EVERYWHERE = dict(max_downsample=8, targets=["attn", "crossattn", "mlp"], ratio=BY_LEVEL)
STACKS = dict(max_downsample=8, targets="stack")
close = dict(rtol=1e-4, atol=1e-5)


@torch.no_grad()
def run(network, inputs=None, time=500):
    inputs = tiny_inputs() if inputs is None else inputs
    inputs = {**inputs, "timestep": torch.full_like(inputs["timestep"], time)}
    return network(**inputs, return_dict=False)[0]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(network, fullgraph=True):
    """(compiled network, its graphs)."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(network, fullgraph=fullgraph, backend=count), graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shapes", "options"),
    [
        (lambda: tiny_unet(levels=1), [tiny_inputs(size=n) for n in (16, (12, 20))], TARGETS),
        (PIXART.build, [PIXART.inputs(grid) for grid in ((8, 8), (6, 10))], TARGETS),
        (lambda: tiny_unet(levels=2), [tiny_inputs()], EVERYWHERE),
        (lambda: tiny_unet(levels=2), [tiny_inputs()], STACKS),
    ],
    ids=["unet", "transformer", "everywhere", "stacks"],
)
def test_at_most_two_graphs_per_shape_and_the_same_image(build, shapes, options):
    network = build()
    baseline = run(network, shapes[0])
    handle = apply_tome(network, **options)
    model, graphs = compiled(network)
    for number, inputs in enumerate(shapes, start=1):
        for time in (500, 499, 400, 500):
            expected = run(network, inputs, time)
            torch.testing.assert_close(run(model, inputs, time), expected, **close)
        assert 1 <= len(graphs) <= 2 * number
        assert all(row["kept"] == row["tokens"] // 2 for row in handle.stats())
    assert not torch.allclose(run(model, shapes[0]), baseline, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("title", list(NETWORKS)[1:])
def test_other_unets_are_one_graph(title):
    """Those of Stable Diffusion are above."""

    def tensors(model):
        output = run(model, inputs)  # a ControlNet returns a list, one tensor per level
        return [output] if isinstance(output, torch.Tensor) else list(output)

    network, inputs = NETWORKS[title].build(), NETWORKS[title].inputs()
    baseline = tensors(network)
    apply_tome(network, ratio=0.5)
    expected = tensors(network)
    assert NETWORKS[title].compiles == "the whole network"
    model = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(tensors(model), expected)
    # The last tensor is behind all blocks.
    assert not torch.allclose(expected[-1], baseline[-1], atol=1e-3)


@pytest.mark.slow
def test_an_exported_network_merges_at_every_timestep():
    network = tiny_unet(levels=1)
    apply_tome(network, **TARGETS)
    inputs = {**tiny_inputs(), "return_dict": False}
    with torch.no_grad():
        program = torch.export.export(network, (), inputs, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for time in (500, 400):
        torch.testing.assert_close(run(loaded, time=time), run(network, time=time))


# --- state kept between steps ---------------------------------------------------------------------

STEPS = {
    "both, merged as well": dict(cache=FIXED["both"], ratio=0.5),
    "plan_interval": dict(**TARGETS, plan_interval=2),
    "plan_interval of blocks": dict(targets="block", plan_interval=2),
    "ratio by timestep": dict(ratio=dict(base=0.5, timestep=dict(timestep_range=(0.3, 0.8)))),
}


def apply(network, cache=None, **options):
    """The handle of what is applied last."""
    handle = apply_cache(network, cache) if cache else None
    return apply_tome(network, **options) if options else handle


@pytest.mark.slow
@pytest.mark.parametrize("title", STEPS)
def test_steps_differ_and_no_step_of_a_second_run_is_compiled_again(title):
    network, inputs = tiny_unet(levels=2), tiny_inputs()
    baseline = denoise(network, inputs)
    apply(network, **STEPS[title])
    expected = denoise(network, inputs)
    assert not torch.allclose(expected, baseline, atol=1e-3)
    model, graphs = compiled(network, fullgraph=False)
    torch.testing.assert_close(denoise(model, inputs), expected, **close)
    first = len(graphs)
    torch.testing.assert_close(denoise(model, inputs), expected, **close)
    assert 0 < first == len(graphs)
    # What finds runs would be compiled again as these come and go.
    traces = [str(node.stack_trace) for graph in graphs for node in graph.graph.nodes]
    assert any("unet_2d" in one for one in traces) and not any("runs.py" in one for one in traces)
    with pytest.raises(Exception, match="write fullgraph=False"):
        run(torch.compile(network, fullgraph=True, backend="eager"))


@pytest.mark.parametrize(
    ("options", "fullgraph", "check"),
    [
        (dict(cache=FIXED["both"]), True, lambda row: row["skipped"] > 0),
        (STEPS["plan_interval"], False, lambda row: row["plans"] == 2 * 5),
        (STEPS["plan_interval of blocks"], False, lambda row: row["plans"] == 2 * 5),
        (TARGETS, True, lambda row: row["kept"] == 128),
    ],
    ids=["both", "plan_interval", "blocks", "targets"],
)
def test_around_blocks_that_are_compiled_on_their_own(options, fullgraph, check):
    network, inputs = tiny_unet(levels=2), tiny_inputs()
    handle = apply(network, **options)
    expected = denoise(network, inputs)
    network.compile_repeated_blocks(fullgraph=fullgraph, backend="eager")
    if "cache" in options:
        handle.reset_stats()
    torch.testing.assert_close(denoise(network, inputs), expected)
    assert all(map(check, handle.stats()))


# --- applying and removing ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(ratio=0.5), dict(cache=FIXED["most"])], ids=str)
def test_apply_and_remove_after_compiling(options):
    network, inputs, steps = tiny_unet(levels=2), tiny_inputs(), (900, 800, 700, 600)
    baseline = denoise(network, inputs, steps)
    model, _ = compiled(network, fullgraph="ratio" in options)
    assert torch.equal(denoise(model, inputs, steps), baseline)
    for _ in range(2):
        handle = apply(model, **options)
        expected = denoise(network, inputs, steps)
        assert not torch.equal(expected, baseline)
        assert torch.equal(denoise(model, inputs, steps), expected)
        handle.remove()
        assert torch.equal(denoise(model, inputs, steps), baseline)


def test_a_compiled_baseline_copy_does_not_serve_the_merged_one():
    small = tiny_unet(levels=1)
    clone = copy.deepcopy(small)
    apply_tome(clone, ratio=0.5)
    expected = [run(small), run(clone)]
    for which in (0, 1, 0):
        model, _ = compiled([small, clone][which])
        assert torch.equal(run(model), expected[which])


# --- before there is a compiler -------------------------------------------------------------------


@pytest.mark.parametrize("takes_reason", [True, False], ids=["torch 2.8", "torch before 2.8"])
def test_a_method_is_its_plain_self_until_the_compiler_is_prepared(takes_reason, monkeypatch):
    disable, seen = torch.compiler.disable, []

    def with_reason(fn=None, recursive=True, *, reason=None):
        seen.append((recursive, reason))
        return disable(fn, recursive)

    def without(fn=None, recursive=True):
        return with_reason(fn, recursive)

    monkeypatch.setattr("mmagic_tome.graphs._waiting", [])
    monkeypatch.setattr(torch.compiler, "disable", with_reason if takes_reason else without)

    class Hook:
        @eager_only()
        def decide(self, step):
            return 2 * step

        @eager_only(inner=True)
        def run(self): ...

    plain = Hook.__dict__["decide"]
    assert Hook().decide(3) == 6
    for _ in range(2):
        prepare_compiler()
        assert Hook.__dict__["decide"] is not plain and Hook().decide(3) == 6
        assert [recursive for recursive, _ in seen] == [False, True]  # the last one first
    assert all(("fullgraph" in (reason or "")) == takes_reason for _, reason in seen)
