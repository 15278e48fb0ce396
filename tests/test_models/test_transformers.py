# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from denoise import denoising, inputs_at
from tiny_transformers import PIPELINES, TEXT, TRANSFORMERS, image_ids
from torch import nn

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle
from mmagic_tome.merging import MergePlan
from mmagic_tome.methods import METHODS
from mmagic_tome.models import ADAPTERS, find_adapter, rotary
from mmagic_tome.models.flux import grid_of_ids
from mmagic_tome.models.unsupported import why_unsupported
from mmagic_tome.tome.block import BlockPreHook

FLUX, SD3, SD35 = (
    TRANSFORMERS[n] for n in ("Flux.1", "Stable Diffusion 3", "Stable Diffusion 3.5")
)
PIXART = TRANSFORMERS["PixArt-alpha, PixArt-sigma"]
WAN = TRANSFORMERS["Wan 2.1, 2.2 (video)"]
COGVIDEOX = TRANSFORMERS["CogVideoX (video)"]
SITES = (["attn"], ["mlp"], ["attn", "mlp"], ["block"])
JOINT = [
    family
    for family in TRANSFORMERS.values()
    if family not in (PIXART, WAN) and "crossattn" not in family.kinds and family.title != "DiT"
]

every_family = pytest.mark.parametrize("family", TRANSFORMERS.values(), ids=TRANSFORMERS)
every_target = pytest.mark.parametrize("targets", SITES, ids="+".join)
every_target_of_every_family = pytest.mark.parametrize(
    ("family", "targets"),
    [
        pytest.param(family, targets, id=f"{family.title}-{'+'.join(targets)}")
        for family in TRANSFORMERS.values()
        for targets in SITES
        if targets == ["block"] or set(targets) <= set(family.kinds)
    ],
)


def output(network, inputs):
    """The image of a call; some networks give a list of them."""
    return stacked(network(**inputs, return_dict=False)[0])


def stacked(out):
    return torch.stack(out) if isinstance(out, list) else out


@torch.no_grad()
def run(network, inputs, **changes):
    return output(network, {**inputs, **changes})


def difference(one, other):
    """Root mean square, in units of the spread of the second."""
    return float((one - other).pow(2).mean().sqrt() / other.std())


class Seen:
    """Tokens that modules inside were really given: name -> (B, N, C) or its length."""

    def __init__(self, network, *endings):
        self.given = {}
        for name, module in network.named_modules():
            if name.endswith(endings):
                # Behind the module: in front of it other hooks see the unmerged tokens.
                module.register_forward_hook(self._note(name), with_kwargs=True)

    def _note(self, name):
        def hook(module, args, kwargs, output):
            self.given[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def lengths(self):
        return {x.shape[1] for x in self.given.values()}


def first_linears(network, family):
    """Name of the first layer at every target -> (its kind, tokens besides the image's)."""
    names = {module: name for name, module in network.named_modules()}
    adapter, _ = find_adapter(network)
    found = {}
    for block in adapter.blocks(network):
        (beside,) = [
            *(count for name, count in family.beside.items() if block.name.startswith(name)),
            TEXT,
        ][:1]
        for kind, modules in block.targets.items():
            modules = list(modules) if isinstance(modules, list) else [modules]
            modules = [
                modules[0],
                *([block.second_attention[kind]] if kind in block.second_attention else []),
            ]
            joined = kind == "attn" and block.name.startswith(family.joins_inside)
            others = beside if kind in block.joint_sequence or joined else 0
            for module in modules:
                linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
                found[names[linear]] = (kind, others)
    return found


# --- every family ---------------------------------------------------------------------------------


@every_target_of_every_family
def test_tokens_fall_inside_and_the_output_changes_a_little(family, targets):
    network, inputs = family.build(), family.inputs()
    baseline = run(network, inputs)
    assert baseline.std() > 0.05
    assert difference(run(network, family.inputs(time=100)), baseline) > 1e-3
    handle = apply_tome(network, ratio=0.5, targets=targets)
    linears = first_linears(network, family)
    seen = Seen(network, *linears)
    merged = run(network, inputs)
    tokens = family.tokens()
    assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(tokens, tokens // 2)}
    for name, (kind, text) in linears.items():
        expected = tokens // 2 if kind in targets or "block" in targets else tokens
        assert seen.given[name].shape[1] == text + expected, name
    assert 1e-4 < difference(merged, baseline) < 0.8
    assert torch.equal(run(network, inputs), merged)
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
    assert len(blocks) == sum(
        family.options.get(f"{n}_{name}", 0) for n in ("num", "n") for name in LISTS
    ) - (1 if family.title.startswith("HunyuanVideo") else 0)  # the text's refiner
    for block in blocks:
        assert network.get_submodule(block.name) is block.module
        assert "attn" in block.targets and set(block.targets) <= set(family.kinds)
    assert set().union(*(block.targets for block in blocks)) == set(family.kinds)
    handle = apply_tome(network, ratio=0.5, targets=family.inner)
    run(network, family.inputs())
    assert {row["plans"] for row in handle.stats()} == {1}


# What the options call the numbers of blocks.
LISTS = ("layers", "single_layers", "mmdit_layers", "single_dit_layers", "refiner_layers")


@every_family
def test_the_timestep_is_where_the_adapter_says(family):
    network = family.build()
    adapter, _ = find_adapter(network)
    names = list(inspect.signature(type(network).forward).parameters)
    name = names[1 + adapter.timestep_position]
    assert name == adapter.timestep_name and name in family.inputs()
    given = family.inputs(time=250)[name]
    for args, kwargs in (
        ((None,) * adapter.timestep_position + (given,), {}),
        ((None,), {name: given}),
    ):
        timestep = adapter.timestep(args, kwargs)
        # 1 = pure noise, whichever way the network counts.
        assert float(timestep[0]) / adapter.timestep_scale == pytest.approx(0.25)
    assert adapter.timestep((None,), {}) is None


@every_family
@pytest.mark.parametrize("batch", [1, 3])
def test_odd_grids_and_batches(family, batch):
    network = family.build()
    apply_tome(network, ratio=0.6, targets=family.inner)
    for grid in family.grids:
        tokens = family.tokens(grid)
        inputs = family.inputs(grid, batch)
        merged = run(network, inputs)
        assert merged.isfinite().all()
        rows = {(row["tokens"], row["kept"]) for row in get_handle(network).stats()}
        assert rows == {(tokens, tokens - int(0.6 * tokens))}
        copied = copy.deepcopy(network)
        with apply_tome(copied, ratio=0):
            assert run(copied, inputs).shape == merged.shape


@every_family
def test_large_odd_grids_and_a_batch_of_eight(family):
    network = family.build()
    apply_tome(network, ratio=0.5, targets=family.inner)
    for grid, batch in (*((grid, 1) for grid in family.large_grids), (family.grids[1], 8)):
        tokens = family.tokens(grid)
        merged = run(network, family.inputs(grid, batch))
        assert merged.isfinite().all() and merged.shape[0] == batch
        rows = {(row["tokens"], row["kept"]) for row in get_handle(network).stats()}
        assert rows == {(tokens, tokens - tokens // 2)}


@every_target_of_every_family
def test_entries_of_a_batch_do_not_touch_each_other(family, targets):
    """Above all rotary rows, which differ between entries once tokens are merged."""
    network = family.build()
    apply_tome(network, ratio=0.5, targets=targets)
    inputs = family.inputs(batch=3)
    together = run(network, inputs)
    for entry in range(3):
        alone = {
            name: value[entry : entry + 1]
            if isinstance(value, (torch.Tensor, list)) and not name.endswith("ids")
            else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(run(network, alone), together[entry : entry + 1])


def calls_of(family):
    """timestep -> arguments of a call."""
    return lambda time: family.inputs(time=time)


@every_family
def test_reused_plans_and_residual(family):
    network = family.build()
    for targets in (family.inner, ["block"]):
        errors = {}
        for residual in (False, True):
            options = dict(ratio=0.5, plan_interval=2, residual=residual, targets=targets)
            with apply_tome(network, **options) as handle:
                steps = list(denoising(network, calls_of(family), (500, family.next_time)))
                assert {row["kept"] for row in handle.stats()} == {family.tokens() // 2}
                assert {row["plans"] for row in handle.stats()} == {1}
            merged = [stacked(step.output) for step in steps]
            first, second = (
                run(network, inputs_at(calls_of(family), step.time, step.latent)) for step in steps
            )
            assert torch.equal(merged[0], first) == residual
            errors[residual] = difference(merged[1], second)
        assert 0 < errors[True] < 0.5 * errors[False], errors


@every_family
def test_step_caching(family):
    """Of the whole network and of its inner blocks, alone and with token merging."""
    network = family.deeper(4).build()
    steps = (900, 895, 890, 885, 880)
    baseline = [stacked(step.output) for step in denoising(network, calls_of(family), steps)]
    blocks = [block.module for block in find_adapter(network)[0].blocks(network)]
    calls = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: calls.append(module))
    for region in ("network", "inner"):
        options = dict(region=region, timestep_range=(0, 1), order=1)
        with apply_cache(network, **options) as handle:
            assert type(network).__name__ == family.class_name
            calls.clear()
            cached = [stacked(step.output) for step in denoising(network, calls_of(family), steps)]
            (row,) = handle.stats()
            # Two steps to extrapolate from, then every second one.
            assert (row["region"], row["computed"], row["skipped"]) == (region, 3, 2)
            assert all(torch.equal(one, other) for one, other in zip(cached[:2], baseline))
            if region == "network":
                torch.testing.assert_close(cached[2], 2 * cached[1] - cached[0])
                assert len(calls) == 3 * len(blocks)
            else:
                assert cached[2].isfinite().all() and not torch.equal(cached[2], baseline[2])
                assert 3 * len(blocks) < len(calls) < 5 * len(blocks)
            with apply_tome(network, ratio=0.5, targets=family.inner) as merging:
                both = [
                    stacked(step.output) for step in denoising(network, calls_of(family), steps)
                ]
                assert {row["kept"] for row in merging.stats()} == {family.tokens() // 2}
            assert not torch.equal(both[2], cached[2])
            again = [stacked(step.output) for step in denoising(network, calls_of(family), steps)]
            assert all(torch.equal(one, other) for one, other in zip(again, cached))
        assert not any(vars(module).get("_mmagic_tome_interceptors") for module in blocks)
    again = [stacked(step.output) for step in denoising(network, calls_of(family), steps)]
    assert all(torch.equal(one, other) for one, other in zip(again, baseline))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods(method):
    """Every plan knows who stands for its slots."""
    network = FLUX.build()
    if METHODS[method].keeps_queries:
        with pytest.raises(ToMeError, match="method that merges queries too"):
            apply_tome(network, ratio=0.5, method=method)
        return
    inputs = FLUX.inputs()
    baseline = run(network, inputs)
    apply_tome(network, ratio=0.5, method=method, targets=["attn", "mlp"])
    merged = run(network, inputs)
    assert merged.isfinite().all() and not torch.equal(merged, baseline)


@every_family
@pytest.mark.parametrize("around", ["inside", "block"])
def test_gradients_are_those_without_checkpointing(family, around):
    network, inputs = family.build().train(), family.inputs()
    if not network._supports_gradient_checkpointing:
        pytest.skip("diffusers has no checkpointing for it")
    if family.title == "Chroma":  # whose single blocks lose the mask under checkpointing
        inputs["attention_mask"] = None
    apply_tome(network, ratio=0.5, targets="block" if around == "block" else family.inner)

    def gradients():
        network.zero_grad()
        output(network, inputs).square().sum().backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    expected = gradients()
    network.enable_gradient_checkpointing()
    found = gradients()
    assert expected.keys() == found.keys() and len(expected) > 20
    assert {row["kept"] for row in get_handle(network).stats()} == {family.tokens() // 2}
    for name, gradient in expected.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: name + text)


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [SD3, SD35, FLUX], ids=["SD 3", "SD 3.5", "Flux"])
@every_target
def test_text_is_not_merged(family, targets):
    network = family.build()
    apply_tome(network, ratio=0.5, targets=targets)
    seen = Seen(network, "add_k_proj", "ff_context.net.0.proj")
    run(network, family.inputs())
    assert len(seen.given) >= 4 and seen.lengths() == {TEXT}


def test_text_in_front_goes_through_bit_for_bit():
    network = FLUX.build()
    apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    block = network.single_transformer_blocks[0]
    normed = []
    block.norm.register_forward_hook(lambda module, args, output: normed.append(output[0]))
    seen = Seen(block, "proj_mlp", "to_q")
    run(network, FLUX.inputs())
    for x in seen.given.values():
        assert x.shape[1] == TEXT + 32
        assert torch.equal(x[:, :TEXT], normed[0][:, :TEXT])


# --- what follows the tokens -------------------------------------------------------------------


def in_another_order(self, context, metric, *_):
    """In place of :meth:`BlockPreHook.compute`: nothing merges, the tokens change places."""
    batch, tokens = metric.shape[:2]
    generator = torch.Generator().manual_seed(tokens)
    order = [torch.randperm(tokens, generator=generator) for _ in range(batch)]
    return MergePlan(torch.stack(order), tokens)


ROTARY = {name for name, family in TRANSFORMERS.items() if family.rotary}


@every_target_of_every_family
def test_another_order_of_the_tokens_changes_nothing(family, targets, monkeypatch):
    """Of the image's, in every entry of the batch another: positions and masks go with them."""
    grid = family.grids[-1] if family.square else (5, 6)
    network, inputs = family.build(), family.inputs(grid, batch=3)
    baseline = run(network, inputs)
    monkeypatch.setattr(BlockPreHook, "compute", in_another_order)
    apply_tome(network, ratio=0.5, targets=targets)
    seen = Seen(network, *(name for name, (kind, _) in first_linears(network, family).items()))
    torch.testing.assert_close(run(network, inputs), baseline, rtol=1e-3, atol=1e-4)
    assert seen.given
    # Where positions are not part of the tokens, leaving the table as it is shows.
    asked = []

    def left_as_it_is(part, plan):
        asked.append(part)
        return part

    monkeypatch.setattr(rotary, "_merged_rows", left_as_it_is)
    wrong = run(network, inputs)
    assert bool(asked) == (family.title in ROTARY and targets != ["mlp"])
    if asked:
        assert difference(wrong, baseline) > 1e-3


@every_family
def test_half_precision(family):
    network, inputs = family.build(), family.inputs()
    apply_tome(network, ratio=0.5, targets=family.inner)
    expected = run(network, inputs)
    network.to(torch.bfloat16)

    def half(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            return value.bfloat16()
        return [half(one) for one in value] if isinstance(value, list) else value

    halves = {name: half(value) for name, value in inputs.items()}
    if family.title == "Hunyuan-DiT":  # which computes in the timestep's type
        halves["timestep"] = halves["timestep"].bfloat16()
    found = run(network, halves)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    # Rounding sends some tokens to other destinations.
    assert difference(found.float(), expected) < 0.5
    assert {row["kept"] for row in get_handle(network).stats()} == {family.tokens() // 2}


# --- rotary embeddings ----------------------------------------------------------------------------


class SamePlaceInACell(nn.Module):
    """Flux' table for a grid whose tokens have the place of their 2x2 cell."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner((ids / 2).floor())


@every_target
@pytest.mark.parametrize("batch", [1, 2])
def test_merging_exact_copies_changes_nothing(targets, batch):
    """Cells of four equal tokens with equal rows, no text: four equal keys weigh like one.

    Rows that were averaged, or those of other slots, would turn queries against keys.
    """
    network = FLUX.build()
    network.pos_embed = SamePlaceInACell(network.pos_embed)
    cells = FLUX.inputs((4, 5), batch)["hidden_states"].view(batch, 4, 1, 5, 1, 4)
    inputs = FLUX.inputs((8, 10), batch)
    inputs.update(
        hidden_states=cells.expand(-1, -1, 2, -1, 2, -1).reshape(batch, 80, 4),
        encoder_hidden_states=inputs["encoder_hidden_states"][:, :0],
        txt_ids=torch.zeros(0, 3),
    )
    baseline = run(network, inputs)
    handle = apply_tome(network, ratio=0.75, targets=targets, exact_matching=True)
    torch.testing.assert_close(run(network, inputs), baseline)
    assert {row["kept"] for row in handle.stats()} == {20}
    # The same with a table that does not follow fails.
    network.pos_embed = Shuffled(network.pos_embed)
    assert not torch.allclose(run(network, inputs), baseline, atol=1e-2)


class Shuffled(nn.Module):
    """Rows in reverse order."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return tuple(part.flip(0) for part in self.inner(ids))


class SamePlaceInACellOfAFrame(nn.Module):
    """The same for Wan, whose table is made from the latent: every token has its cell's first."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, latent):
        frames, height, width = latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2
        place = torch.arange(frames * height * width).view(frames, height, width)
        first = place[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2).flatten()
        return tuple(part[:, first] for part in self.inner(latent))


@every_target
def test_merging_exact_copies_of_a_video_changes_nothing(targets):
    network, inputs = WAN.build(), WAN.inputs((4, 6))
    network.rope = SamePlaceInACellOfAFrame(network.rope)
    # Patches of 2x2 in cells of 2x2 patches: every patch is that to its left and above.
    patch = inputs["hidden_states"].unflatten(4, (3, 2, 2)).unflatten(3, (2, 2, 2))
    latent = patch[:, :, :, :, :1, :, :, :1].expand_as(patch)
    inputs["hidden_states"] = latent.flatten(6, 8).flatten(3, 5)
    baseline = run(network, inputs)
    handle = apply_tome(network, ratio=0.75, targets=targets, exact_matching=True)
    torch.testing.assert_close(run(network, inputs), baseline)
    assert {row["kept"] for row in handle.stats()} == {12}


@pytest.mark.parametrize("batch", [1, 2])
def test_kept_tokens_keep_their_places(batch):
    """The rows that attention is given are the text's and those of 32 tokens."""
    network = FLUX.build()
    apply_tome(network, ratio=0.5, targets=["attn"])
    calls = []
    for blocks in (network.transformer_blocks, network.single_transformer_blocks):
        blocks[0].attn.register_forward_hook(
            lambda module, args, kwargs, y: calls.append(kwargs["image_rotary_emb"]),
            with_kwargs=True,
        )
    tables = []
    network.pos_embed.register_forward_hook(lambda module, args, output: tables.append(output))
    run(network, FLUX.inputs(batch=batch))
    cos, sin = tables[0]
    assert len(calls) == 2
    for merged_cos, merged_sin in calls:
        for entry in range(batch):
            given = torch.cat([rows(merged_cos, entry), rows(merged_sin, entry)], dim=1)
            table = torch.cat([cos, sin], dim=1)
            assert given.shape[0] == TEXT + 32
            assert torch.equal(given[:TEXT], table[:TEXT])
            # Every row is one of the table, and no two are of the same place.
            same = (given[TEXT:, None] == table[None, TEXT:]).all(dim=-1)
            assert (same.sum(dim=1) == 1).all() and same.any(dim=0).sum() == 32


def rows(table, entry):
    """Rows for one entry of the batch, got at as attention does."""
    if isinstance(table, torch.Tensor):
        return table
    return table[None, :, None, :][entry, :, 0]


def test_the_grid_of_img_ids():
    for grid in ((8, 8), (3, 20), (1, 7), (7, 1), (600, 2)):
        ids = image_ids(*grid)
        assert grid_of_ids(ids) == grid
        assert grid_of_ids(ids.bfloat16()[None]) == grid
    with torch.inference_mode():
        assert grid_of_ids(image_ids(2, 3)) == (2, 3)
    ids = image_ids(4, 4)
    assert grid_of_ids(ids) == (4, 4)
    ids.copy_(image_ids(2, 8))
    assert grid_of_ids(ids) == (2, 8)  # remembered by content, not by object alone
    reference = image_ids(4, 4)
    reference[:, 0] = 1
    with pytest.raises(ToMeError, match="not one image row by row"):
        grid_of_ids(torch.cat([image_ids(4, 4), reference]))
    with pytest.raises(ToMeError, match="not one image row by row"):
        grid_of_ids(image_ids(4, 4)[:-1])


# --- what cannot be merged ------------------------------------------------------------------------


@pytest.mark.parametrize("family", JOINT, ids=lambda family: family.title)
def test_sites_that_joint_attention_does_not_allow(family):
    network = family.build()
    with pytest.raises(ToMeError, match=r"\w\.0 cannot be merged at 'attn_kv'.*tome"):
        apply_tome(network, ratio=0.5, targets=["attn_kv"])
    with pytest.raises(ToMeError, match=r"at 'stack'.*targets='block'"):
        apply_tome(network, ratio=0.5, targets="stack")
    with pytest.raises(ToMeError, match="no transformer block with a target crossattn"):
        apply_tome(network, ratio=0.5, targets=["crossattn"])
    assert get_handle(network) is None


def test_stack_of_one_stream():
    network, inputs = PIXART.build(), PIXART.inputs()
    baseline = run(network, inputs)
    handle = apply_tome(network, ratio=0.5, targets="stack")
    seen = Seen(network, "to_q", "ff.net.0.proj")
    assert 1e-4 < difference(run(network, inputs), baseline) < 0.6
    assert seen.lengths() == {32} and len(handle.stats()) == 1


def test_arguments_that_do_not_fit_merged_tokens():
    network, inputs = FLUX.build(), FLUX.inputs()
    apply_tome(network, ratio=0.5)
    mask = torch.ones(2, 1, 1, TEXT + 64, dtype=torch.bool)
    with pytest.raises(ToMeError, match="attn received an attention_mask"):
        run(network, inputs, joint_attention_kwargs=dict(attention_mask=mask))
    with pytest.raises(ToMeError, match="IP-Adapter"):
        run(network, inputs, joint_attention_kwargs=dict(ip_hidden_states=[torch.zeros(2, 3, 16)]))
    assert run(network, inputs).isfinite().all()


def test_a_timestep_per_token():
    """Wan 2.2 from a image: its first frame has timestep 0 at every step."""
    network = WAN.build()

    def inputs(time):
        steps = torch.full((2, 128), time)
        steps[:, :64] = 0
        return {**WAN.inputs(), "timestep": steps}

    baseline = run(network, inputs(500))
    with apply_tome(network, ratio=0.5, plan_interval=2, targets=["attn", "mlp"]) as handle:
        assert 1e-4 < difference(run(network, inputs(500)), baseline) < 0.6
        run(network, inputs(400))
        assert {row["plans"] for row in handle.stats()} == {1}  # the second step of a run
    apply_tome(network, ratio=0.5, targets="block")
    with pytest.raises(ToMeError, match=r"blocks.0.block received one timestep per token"):
        run(network, inputs(500))
    assert run(network, WAN.inputs()).isfinite().all()


def several_images(inputs):
    return dict(img_shapes=[[(1, 8, 4), (1, 8, 4)]] * 2)


def a_timestep_per_token(inputs):
    return dict(timestep=torch.full((2, 128), 500))


# Family -> (more options, targets, other arguments, what the error says to write).
REFUSED_CALLS = {
    "Qwen-Image": ({}, ["attn"], several_images, "2 images in one sequence.*without token"),
    "Z-Image": (
        {},
        ["attn"],
        lambda inputs: dict(x=[inputs["x"][0], inputs["x"][1][..., :8]]),
        "images of 2 sizes in one batch.*one size at a time",
    ),
    "Flux.2": (
        {},
        ["attn"],
        lambda inputs: dict(kv_cache_mode="extract", num_ref_tokens=8),
        r"kv_cache_mode.*call the model without it",
    ),
    "LTX-Video (video)": (
        {},
        "block",
        a_timestep_per_token,
        r"block received one timestep per token.*write targets=\['attn', 'mlp'\]",
    ),
    "SkyReels V2 (video)": (
        dict(num_frame_per_block=2),
        ["attn"],
        lambda inputs: {},
        r"causal mask over frames.*write targets=\['crossattn', 'mlp'\]",
    ),
}


@pytest.mark.parametrize("title", REFUSED_CALLS)
def test_calls_that_do_not_fit_merged_tokens(title):
    options, targets, other, message = REFUSED_CALLS[title]
    family = TRANSFORMERS[title]
    family = replace(family, options={**family.options, **options})
    network, inputs = family.build(), family.inputs()
    changed = {**inputs, **other(inputs)}
    with apply_tome(network, ratio=0.5, targets=targets):
        with pytest.raises(ToMeError, match=message):
            run(network, changed)
        if not options:  # and the next call is as usual
            assert run(network, inputs).isfinite().all()


def test_ltx_in_the_terms_of_its_conditions():
    """A timestep per token goes well with the inside of blocks; sizes must be known."""
    family = TRANSFORMERS["LTX-Video (video)"]
    network, inputs = family.build(), family.inputs()
    apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    assert run(network, inputs, **a_timestep_per_token(inputs)).isfinite().all()
    coords = torch.rand(2, 3, 128)
    with pytest.raises(ToMeError, match="without num_frames, height and width"):
        run(network, inputs, num_frames=None, height=None, width=None, video_coords=coords)


def test_hunyuan_video_with_a_given_first_frame():
    family = TRANSFORMERS["HunyuanVideo (video)"]
    changed = {**family.options, "image_condition_type": "token_replace"}
    network, inputs = replace(family, options=changed).build(), family.inputs()
    with pytest.raises(ToMeError, match=r"first frame.*Write targets=\['attn', 'mlp'\]"):
        apply_tome(network, ratio=0.5, targets="block")
    baseline = run(network, inputs)
    apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    assert 1e-4 < difference(run(network, inputs), baseline) < 0.8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SanaTransformer2DModel", "its attention is linear"),
        ("LuminaNextDiT2DModel", "share one output projection"),
        ("WanAnimateTransformer3DModel", "pose and face branches"),
        ("HunyuanVideoFramepackTransformer3DModel", "frames at several resolutions"),
        ("StableAudioDiTModel", "not a grid of rows and columns"),
        ("MochiTransformer3DModel", "no adapter is written for this diffusion transformer"),
        ("FluxControlNetModel", "merges the network that it controls"),
        ("SomethingElse", "Supported"),
    ],
)
def test_unsupported_transformers_are_named_with_the_reason(name, reason):
    import diffusers

    network = type(name, (nn.Module,), {})()
    assert name == "SomethingElse" or hasattr(diffusers, name)
    with pytest.raises(
        ToMeError, match=f"found no supported network in a {name}.*{reason}"
    ) as error:
        apply_tome(network)
    for text in ("down_blocks and up_blocks", "FluxTransformer2DModel", "docs/adding_a_model.md"):
        assert text in str(error.value)


def test_every_transformer_of_diffusers_is_merged_or_says_why_not():
    import diffusers
    from diffusers.models import transformers

    names = [name for name in dir(transformers) if name.endswith(("Model", "Transformer"))]
    assert set(FAMILY_CLASSES) <= set(names) and len(names) > 20
    for name in names:
        if not issubclass(getattr(transformers, name), diffusers.ModelMixin):
            continue
        served = any(one.matches(_named(name)) for one in ADAPTERS[4:])
        assert served == (name in FAMILY_CLASSES)
        assert served or why_unsupported(name).startswith(f"{name}: "), name


FAMILY_CLASSES = {family.class_name for family in TRANSFORMERS.values()}


def _named(name):
    """A network of that name; the one of PixArt's older checkpoints is known by an attribute."""
    network = type(name, (nn.Module,), {})()
    network.is_input_patches = True
    return network


# --- pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", PIPELINES)
def test_pipelines(title):
    """What diffusers' own pipelines call the networks with, over all steps."""
    case = PIPELINES[title]
    pipeline = case.build(TRANSFORMERS[title])
    baseline = case.run(pipeline)
    with apply_tome(
        pipeline, ratio=0.5, plan_interval=2, targets=TRANSFORMERS[title].inner
    ) as handle:
        assert handle.network is pipeline.transformer
        merged = case.run(pipeline)
        tokens, calls = case.tokens, 8 if case.guided else 4
        seen = {(r["tokens"], r["kept"], r["calls"], r["plans"]) for r in handle.stats()}
        # Plans are reused for two steps only if the adapter reads the timestep.
        assert seen == {(tokens, tokens // 2, calls, calls // 2)}
        assert torch.equal(case.run(pipeline), merged)
        handle.ratio = 0
        assert torch.equal(case.run(pipeline), baseline)
    assert 1e-4 < difference(merged, baseline) < 0.8
    assert torch.equal(case.run(pipeline), baseline)


# --- compiling ------------------------------------------------------------------------------------


@pytest.mark.slow
@every_family
def test_compiled(family):
    network, inputs = family.build(), family.inputs()
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


@pytest.mark.slow
@pytest.mark.parametrize("region", ["network", "inner"])
@pytest.mark.parametrize("family", [FLUX, SD3, WAN], ids=["Flux", "SD 3", "Wan"])
def test_compiled_blocks_with_step_caching(family, region):
    """What compile_repeated_blocks does, with both techniques on."""
    network = family.deeper(4).build()
    apply_tome(network, ratio=0.5, targets=family.inner)
    apply_cache(network, region=region, timestep_range=(0, 1), order=0)
    steps = (900, 800, 700, 600)
    expected = [stacked(step.output) for step in denoising(network, calls_of(family), steps)]
    torch._dynamo.reset()
    for block in find_adapter(network)[0].blocks(network):
        block.module.compile(fullgraph=True, backend="eager")
    handle = get_handle(network, "cache")
    handle.reset_stats()
    found = [stacked(step.output) for step in denoising(network, calls_of(family), steps)]
    assert [(row["computed"], row["skipped"]) for row in handle.stats()] == [(2, 2)]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
