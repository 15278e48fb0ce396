# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Diffusion transformers: what every family does when it is merged."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from denoise import denoising, inputs_at
from model_runs import AttentionCalls, Seen, counts, difference, grids_of, image, output, run
from tiny_transformers import TEXT, TRANSFORMERS
from torch import nn

from mmagic_tome import apply_tome
from mmagic_tome.models import find_adapter

SITES = (["attn"], ["mlp"], ["attn", "mlp"], ["block"], ["stack"])
# Endings of layers that run on the text alone.
TEXT_LAYERS = ("add_k_proj", "ff_context.net.0.proj", "txt_mlp.net.0.proj")

every_family = pytest.mark.parametrize("family", TRANSFORMERS.values(), ids=TRANSFORMERS)
every_target_of_every_family = pytest.mark.parametrize(
    ("family", "targets"),
    [
        pytest.param(family, targets, id=f"{family.title}-{'+'.join(targets)}")
        for family in TRANSFORMERS.values()
        for targets in SITES
        if {*targets} <= {*family.kinds, "block"}
        or (targets == ["stack"] and family.title.startswith(("DiT", "PixArt")))
    ],
)


def first_linears(network, family):
    """Name of the first layer at every target -> (its kind, tokens besides the image's)."""
    names = {module: name for name, module in network.named_modules()}
    found = {}
    for block in find_adapter(network)[0].blocks(network):
        besides = [n for name, n in family.beside.items() if block.name.startswith(name)]
        for kind, modules in block.targets.items():
            joined = kind == "attn" and block.name.startswith(family.joins_inside)
            others = (*besides, TEXT)[0] if kind in block.joint_sequence or joined else 0
            first = modules[0] if isinstance(modules, list) else modules
            second = block.second_attention.get(kind)
            for module in filter(None, (first, second)):
                linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
                found[names[linear]] = (kind, others)
    return found


def one_entry(inputs, entry):
    """Arguments for one image of a batch alone."""
    batched = [
        n for n, x in inputs.items() if isinstance(x, (torch.Tensor, list)) and n[-3:] != "ids"
    ]
    return {**inputs, **{name: inputs[name][entry : entry + 1] for name in batched}}


@every_target_of_every_family
def test_tokens_fall_inside_and_the_output_changes_a_little(family, targets):
    network, inputs = family.build(), family.inputs()
    text = Seen(network, *TEXT_LAYERS)
    baseline, text_lengths = run(network, inputs), text.lengths()
    assert baseline.std() > 0.05
    assert difference(run(network, family.inputs(time=100)), baseline) > 1e-3
    handle = apply_tome(network, ratio=0.5, targets=targets)
    linears = first_linears(network, family)
    seen = Seen(network, *linears)
    merged = run(network, inputs)
    tokens = family.tokens()
    assert counts(handle) == {(tokens, tokens // 2)}
    for name, (kind, others) in linears.items():
        merges = {kind, "block", "stack"}.intersection(targets)
        assert seen.given[name].shape[1] == others + (tokens // 2 if merges else tokens), name
    assert text.lengths() == text_lengths
    assert 1e-4 < difference(merged, baseline) < 0.8
    alone = [run(network, one_entry(inputs, entry)) for entry in range(2)]
    torch.testing.assert_close(torch.cat(alone), merged)
    handle.ratio = 0
    assert torch.equal(run(network, inputs), baseline)
    handle.ratio = 0.5
    assert torch.equal(run(network, inputs), merged)
    handle.remove()
    assert torch.equal(run(network, inputs), baseline)


@every_family
def test_every_block_has_its_targets_and_its_own_plan(family):
    network = family.build()
    adapter, found = find_adapter(SimpleNamespace(transformer=network))
    assert found is network
    blocks = adapter.blocks(network)
    of_text = family.title.startswith("HunyuanVideo")  # a block that refines it
    assert len(blocks) == sum(family.lengths.values()) - of_text
    for block in blocks:
        assert network.get_submodule(block.name) is block.module
        assert "attn" in block.targets and set(block.targets) <= set(family.kinds)
    assert set().union(*(block.targets for block in blocks)) == set(family.kinds)
    dual = family.own.get("dual_attention_layers", ())
    assert [i for i, block in enumerate(blocks) if block.second_attention] == [*dual]
    handle = apply_tome(network, ratio=0.5, targets=family.inner)
    run(network, family.inputs())
    assert {row["plans"] for row in handle.stats()} == {1}
    deeper = family.deeper(6).build()
    inner = adapter.inner_modules(deeper, num_outer_blocks=1)
    assert [b.name[-1] for b in adapter.blocks(deeper) if b.module in inner] == [*"1234"]


@every_family
def test_the_timestep_is_where_the_adapter_says(family):
    network = family.build()
    adapter, _ = find_adapter(network)
    position, name = adapter.timestep_position, family.time_name
    assert list(inspect.signature(type(network).forward).parameters)[1 + position] == name
    given = family.inputs(time=250)[name]
    per_token = torch.stack([torch.zeros_like(given), given], dim=1)  # the last one counts
    for timestep in (given, per_token):
        for args, kwargs in (((None,) * position + (timestep,), {}), ((), {name: timestep})):
            # 1 = pure noise, whichever way the network counts.
            found = adapter.timestep(args, kwargs) / adapter.timestep_scale
            assert found.tolist() == pytest.approx([0.25] * 2)
    assert adapter.timestep((None,), {}) is None


@every_family
@pytest.mark.parametrize("method", ["tome", "todo"])
def test_keys_and_values_alone(family, method):
    """The default: all queries stay, in every block's self-attention."""
    network, inputs = family.build(), family.inputs()
    with AttentionCalls() as without:
        baseline = run(network, inputs)
    handle = apply_tome(network, ratio=0.5, method=method)
    with AttentionCalls() as attention:
        merged = run(network, inputs)
    tokens = family.tokens()
    kept = tokens // 2 if method == "tome" else tokens // 4
    assert counts(handle) == {(tokens, kept)}
    assert {row["kind"] for row in handle.stats()} == {"attn_kv"}
    changed = [(one, two) for one, two in zip(attention.lengths(), without.lengths()) if one != two]
    assert len(changed) == len(handle.stats())
    for (queries, *keys), (of_all, all_keys, _) in changed:
        assert queries == of_all >= tokens
        assert keys == [all_keys - tokens + kept] * 2
    assert 1e-4 < difference(merged, baseline) < 0.8
    alone = [run(network, one_entry(inputs, entry)) for entry in range(2)]
    torch.testing.assert_close(torch.cat(alone), merged)


@every_family
def test_reused_plans(family):
    network = family.build()

    def calls(time):
        return family.inputs(time=time)

    for targets in ("auto", family.inner, ["block"]):
        with apply_tome(network, ratio=0.5, plan_interval=2, targets=targets) as handle:
            steps = list(denoising(network, calls, (500, 499.9)))
            rows = {(row["kept"], row["plans"]) for row in handle.stats()}
            assert rows == {(family.tokens() // 2, 1)}
        for step in steps:
            plain = run(network, inputs_at(calls, step.time, step.latent))
            assert 0 < difference(image(step.output), plain) < 0.8


@every_family
@pytest.mark.parametrize("around", ["keys", "inside", "block"])
def test_gradients_are_those_without_checkpointing(family, around):
    network, inputs = family.build().train(), family.inputs()
    if not network._supports_gradient_checkpointing:
        pytest.skip("diffusers has no checkpointing for it")
    if family.title == "Chroma":  # whose single blocks lose the mask under checkpointing
        inputs["attention_mask"] = None
    targets = {"keys": "auto", "inside": family.inner, "block": "block"}[around]
    handle = apply_tome(network, ratio=0.5, targets=targets)

    def gradients():
        torch.manual_seed(0)  # DiT drops labels
        network.zero_grad()
        output(network, inputs).square().sum().backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    expected = gradients()
    network.enable_gradient_checkpointing()
    found = gradients()
    assert len(expected) > 20 and all(gradient.isfinite().all() for gradient in expected.values())
    torch.testing.assert_close(found, expected)
    assert {row["kept"] for row in handle.stats()} == {family.tokens() // 2}


@every_family
def test_odd_grids_and_batches_in_half_precision(family, monkeypatch):
    network = family.build().to(torch.bfloat16)
    grids = grids_of(network, monkeypatch)
    handle = apply_tome(network, ratio=0.6, targets=family.inner)

    def half(name, value):
        if isinstance(value, list):
            return [half(name, one) for one in value]
        # Hunyuan-DiT computes in the timestep's type.
        kept = name == family.time_name and family.title != "Hunyuan-DiT"
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.bfloat16() if floating and not kept else value

    for grid, batch in (*((grid, 1) for grid in family.grids), (family.grids[1], 3)):
        inputs, tokens = family.inputs(grid, batch), family.tokens(grid)
        merged = run(network, {name: half(name, value) for name, value in inputs.items()})
        assert merged.dtype == torch.bfloat16
        assert merged.isfinite().all() and merged.shape[0] == batch
        assert grids[-1] == (family.frames * grid[0], grid[1])
        assert counts(handle) == {(tokens, tokens - int(0.6 * tokens))}


@pytest.mark.slow
@every_family
def test_compiled(family):
    """With one block in each list, since every one is traced."""
    network, inputs = family.changed(**dict.fromkeys(family.lengths, 1)).build(), family.inputs()
    apply_tome(network, ratio=0.5, targets=family.inner)
    expected = run(network, inputs)
    torch._dynamo.reset()
    compiled = network
    if family.compiles == "the whole network":
        compiled = torch.compile(network, fullgraph=True, backend="eager")
    else:  # as compile_repeated_blocks does where diffusers has it
        for block in find_adapter(network)[0].blocks(network):
            block.module.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, inputs), expected)
    torch._dynamo.reset()
