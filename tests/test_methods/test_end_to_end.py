# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every method in a network, through apply_tome."""

import pytest
import torch
from method_requests import SPECS, name_of, request, tokens
from tiny import error, tiny_inputs, tiny_unet

from mmagic_tome import apply_tome
from mmagic_tome.methods import build_method

STEPS = (900, 600, 300)
# With the default threshold a random network may have nothing that is similar enough.
SURE = [spec for spec in SPECS if spec != "threshold"]


@pytest.fixture
def unet():
    return tiny_unet(levels=2)


@torch.no_grad()
def run(unet, steps=STEPS, guided=True, **changes):
    """Outputs of a denoising run of one guided image, whose sample hardly changes."""
    outputs = []
    for i, t in enumerate(steps):
        inputs = tiny_inputs(**changes)
        sample = inputs["sample"]
        halves = torch.cat(2 * [sample.chunk(2)[0]]) if guided else sample
        call = {**inputs, "sample": halves + 0.02 * i, "timestep": torch.tensor(t)}
        outputs.append(unet(**call).sample)
    return torch.stack(outputs)


@pytest.fixture(scope="module")
def baseline():
    return run(tiny_unet(levels=2))


@pytest.mark.parametrize("spec", SURE, ids=name_of)
def test_fewer_tokens_another_image_and_the_baseline_at_ratio_zero(unet, baseline, spec):
    handle = apply_tome(unet, method=spec, ratio=0.5)
    kind = "attn_kv" if name_of(spec) == "todo" else "attn"
    merged = run(unet)
    for row in handle.stats():
        assert row["kind"] == kind and row["plans"] == len(STEPS)
        assert row["tokens"] == 256 and 0 < row["kept"] <= 160
    assert 1e-5 < error(merged, baseline) < 1
    assert torch.equal(run(unet), merged)  # the same run again
    handle.ratio = 0
    assert torch.equal(run(unet), baseline)
    handle.remove()
    assert torch.equal(run(unet), baseline)


@pytest.mark.parametrize(("method", "plans"), [("tofu", 2), ("toma", 1)])
def test_blocks_share_plans_of_their_kind(unet, method, plans):
    """Of ToFu's blocks some prune and some merge."""
    with apply_tome(unet, method=method, ratio=0.5, share_plans=True) as handle:
        run(unet)
        made = {row["block"]: row["plans"] for row in handle.stats()}
        assert sum(made.values()) == len(STEPS) * plans


def test_numbers_that_a_method_draws_depend_on_seed_step_and_block(unet):
    """Without random destinations they are the same at every step."""

    def drawn(**options):
        (patch,) = apply_tome(unet, method="sito", **options)._patches
        ask, seen = (torch.device("cpu"), 10, 500), []

        def note(*_):
            seen.extend(patch.draw(patch.context, block, *ask) for block in patch.blocks[:2])

        with unet.mid_block.register_forward_pre_hook(note):
            run(unet)
        return torch.stack(seen).unflatten(0, (len(STEPS), 2))

    numbers = drawn()
    assert torch.equal(numbers, drawn()) and set(numbers[0, 0].tolist()) == set(range(10))
    for other in (drawn(seed=1)[0, 0], numbers[0, 1], numbers[1, 0]):
        assert not torch.equal(other, numbers[0, 0])
    assert torch.equal(*drawn(use_rand=False)[:2])


@pytest.mark.filterwarnings("ignore:method=")
def test_importance_uses_the_guidance_of_the_last_step(unet):
    def outputs(method, guided=True):
        with apply_tome(unet, method=method, ratio=0.5) as handle:
            found = run(unet, STEPS[:2], guided)
            (patch,) = handle._patches
            runs = patch.context.tracker.runs
        return found, runs and runs[0].branches[0].state.guidance_map

    importance = dict(type="importance", prune_steps=0)
    (first, second), guidance = outputs(importance)
    torch.testing.assert_close(guidance, (second[1] - second[0]).abs().mean(0)[None])
    plain, _ = outputs("tome")
    torch.testing.assert_close(first, plain[0], rtol=1e-4, atol=1e-5)
    assert error(second, plain[1]) > 1e-4
    # An even batch whose halves are two images: as ToMe, whatever the two differ in.
    found, guidance = outputs(importance, guided=False)
    assert guidance is None
    torch.testing.assert_close(found, outputs("tome", guided=False)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tofu", "todo", "toma", "sito", "pitome", "importance"])
def test_plans_compile_without_a_break(name):
    """Those left out: threshold breaks the graph, the others do nothing that these do not."""
    torch.compiler.reset()
    method, ask = build_method(name), request(8, 8, guidance_map=torch.rand(1, 8, 8))

    def target(x):
        plan = method.plan(x, 0.5, ask)
        return plan.unmerge(plan.merge(x).sin())

    x = tokens(2, 8, 8)
    compiled = torch.compile(target, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), target(x))
