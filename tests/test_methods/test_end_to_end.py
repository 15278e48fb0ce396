# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every method in a network, through apply_tome."""

import copy
import json
import warnings

import pytest
import torch
from method_requests import SPECS, name_of, request, tokens
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeConfig, ToMeError, apply_tome
from mmagic_tome.methods import METHODS, build_method

STEPS = (900, 600, 300)
# With the default threshold a random network may have nothing that is similar enough.
SURE = [dict(type="threshold", threshold=-1) if spec == "threshold" else spec for spec in SPECS]
every_variant = pytest.mark.parametrize("spec", SURE, ids=name_of)
every_method = pytest.mark.parametrize("spec", SURE[: len(METHODS)], ids=name_of)


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=2)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


@torch.no_grad()
def run(unet, steps=STEPS, **changes):
    """Outputs of a denoising run of one guided image, whose sample hardly changes."""
    outputs = []
    for i, t in enumerate(steps):
        inputs = tiny_inputs(**changes)
        halves = torch.cat(2 * [inputs["sample"].chunk(2)[0]])
        inputs["sample"] = halves + 0.02 * i
        outputs.append(unet(**{**inputs, "timestep": torch.tensor(t)}).sample)
    return torch.stack(outputs)


@pytest.fixture(scope="module")
def baseline(original):
    return run(original)


def error(a, b):
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@every_variant
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


@every_method
def test_reused_plans_and_residual(unet, baseline, spec):
    with apply_tome(unet, method=spec, ratio=0.5) as handle:
        plain = run(unet)
    with apply_tome(unet, method=spec, ratio=0.5, plan_interval=3) as handle:
        kept = run(unet)
        assert {row["plans"] for row in handle.stats()} == {1}
        assert torch.equal(kept[0], plain[0])
    with apply_tome(unet, method=spec, ratio=0.5, plan_interval=3, residual=True):
        carried = run(unet)
    assert torch.equal(carried[0], baseline[0])
    # The residual restores most of what merging loses between neighbouring steps.
    assert 0 < error(carried[1:], baseline[1:]) < 0.7 * error(kept[1:], baseline[1:])


def matchings(handle):
    """Matchings made so far, over all blocks of the finest level."""
    return sum({row["block"]: row["plans"] for row in handle.stats()}.values())


@every_method
@pytest.mark.parametrize("share", [False, True], ids=["own plans", "share_plans"])
def test_a_plan_serves_steps_and_blocks_and_no_other_run(unet, spec, share):
    # A matching per block, or one for all blocks of the level; ToFu has blocks that prune and
    # blocks that merge, which share one each.
    per_step = 3 if not share else 2 if spec == "tofu" else 1
    options = dict(method=spec, ratio=0.5, plan_interval=2, share_plans=share)
    with apply_tome(unet, **options) as handle:
        seen, runs = [], []
        for steps, changes in (
            (STEPS, {}),  # the first and the third step compute plans
            (STEPS, {}),  # back to the first timestep
            ((200,), dict(batch=4)),  # a lower timestep, but another batch
            ((100,), dict(batch=4, size=(12, 20))),  # ... and another size
            ((50,), dict(batch=4, size=(12, 20))),  # the same run goes on
        ):
            outputs = run(unet, steps, **changes)
            seen.append(matchings(handle) // per_step)
            assert matchings(handle) % per_step == 0
            runs.append(outputs)
            assert {row["kept"] < row["tokens"] for row in handle.stats()} == {True}
    assert seen == [2, 4, 5, 6, 6]
    assert torch.equal(runs[0], runs[1])


@every_method
@pytest.mark.parametrize("targets", [["crossattn", "mlp"], ["block"], ["stack"]])
def test_at_other_targets_of_both_levels_on_an_odd_grid(unet, spec, targets):
    options = dict(method=spec, targets=targets, ratio=0.5, max_downsample=2)
    with apply_tome(unet, **options) as handle:
        outputs = run(unet, steps=(900,), size=(14, 18))
        for row in handle.stats():
            # ToDo leaves the coarser level unmerged.
            unmerged = name_of(spec) == "todo" and row["downsample"] == 2
            assert row["kept"] == row["tokens"] if unmerged else row["kept"] < row["tokens"]
    assert outputs.isfinite().all()


def test_every_target_may_have_a_method_of_its_own(unet):
    method = dict(mlp=dict(type="downsample", mode="nearest"), attn="todo", crossattn="prune")
    options = dict(
        targets=["attn", "crossattn", "mlp"], ratio=dict(base=0.25, target={"attn": 0.5})
    )
    with apply_tome(unet, method=method, **options) as handle:
        together = run(unet)
        kept = {(row["kind"], row["kept"]) for row in handle.stats()}
        assert kept == {("attn_kv", 64), ("crossattn", 192), ("mlp", 64)}
        config = ToMeConfig.coerce(json.loads(json.dumps(handle.config.to_dict())))
        assert config == handle.config
    # The same as three methods one at a time, each at its target.
    for target in method:
        alone = dict(method=method[target], targets=[target])
        alone.update(ratio=0.5 if target == "attn" else 0.25)
        with apply_tome(unet, **alone) as handle:
            run(unet)
            assert {(row["kind"], row["kept"]) for row in handle.stats()} <= kept
    # One number for all, plans that are reused, one plan for a level.
    options = dict(method=method, targets=options["targets"])
    for more in ({}, dict(plan_interval=3), dict(plan_interval=3, share_plans=True)):
        with apply_tome(unet, **options, **more) as handle:
            outputs = run(unet)
            assert {row["kept"] for row in handle.stats()} == {64, 128}
        assert 1e-5 < error(outputs, together) < 1


def test_guidance_is_watched_where_one_target_asks_for_it(unet):
    method = dict(attn="tome", mlp="importance")
    with apply_tome(unet, method=method, targets=["attn", "mlp"]) as handle:
        run(unet, STEPS[:2])
        assert handle.config.tracks_steps and guidance_map(handle) is not None


def guidance_map(handle):
    """What this thread's run, before its last step, keeps for methods that watch the output."""
    (patch,) = handle._patches
    return patch.context.tracker.runs[0].branches[0].state.guidance_map


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(method=dict(attn="tome", mlp="prune")), "targets are attn; write targets="),
        (dict(method=dict(attn="tome"), targets=["attn", "mlp"]), "targets are attn, mlp"),
        (dict(method=dict(mlp="tome"), targets=["attn"]), "write targets=['mlp']"),
        (dict(method=dict(attn="tome", mpl="prune")), "no option 'mpl': did you mean 'mlp'"),
        (dict(method=dict(attn="tomme")), "did you mean 'tome'"),
        (
            dict(method=dict(attn="pitome", mlp="tome"), targets=["attn", "mlp"], ratio=0.6),
            "ceiling 0.5",
        ),
    ],
)
def test_bad_methods_by_target_are_named(options, said):
    with pytest.raises(ToMeError) as error:
        ToMeConfig(**options)
    assert said in str(error.value)


def test_todo_leaves_the_queries(unet):
    seen = {"to_q": set(), "to_k": set(), "to_v": set()}
    for name, module in unet.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in seen and ".attn1." in name:
            note = seen[last].add
            module.register_forward_pre_hook(lambda m, args, note=note: note(args[0].shape[1]))
    with apply_tome(unet, method="todo", max_downsample=2):
        run(unet, steps=(900,))
    assert seen == {"to_q": {256, 64}, "to_k": {64}, "to_v": {64}}
    # 64 is both: the finest level scaled down, and the coarser one as it is.


def test_importance_uses_the_guidance_of_the_last_step(unet):
    """From the second step on its plan differs from the one without a guidance map."""
    with apply_tome(unet, method=dict(type="importance", prune_steps=0), ratio=0.5) as handle:
        guided = run(unet, STEPS[:2])
        guidance = guidance_map(handle)
    assert guidance.shape == (1, 16, 16)
    empty, text = guided[-1]
    torch.testing.assert_close(guidance[0], (text - empty).abs().mean(0))
    with apply_tome(unet, method="tome", ratio=0.5):
        plain = run(unet, STEPS[:2])
    torch.testing.assert_close(guided[0], plain[0], rtol=1e-4, atol=1e-5)
    assert error(guided[1], plain[1]) > 1e-4


@torch.no_grad()
def test_two_images_of_a_batch_are_no_guidance(unet):
    """An even batch whose halves are not one image: as ToMe, whatever the two differ in."""
    outputs = []
    for method in (dict(type="importance", prune_steps=0), "tome"):
        with apply_tome(unet, method=method, ratio=0.5) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a method that has nothing to watch
            for i, t in enumerate(STEPS):
                inputs = tiny_inputs()
                inputs["sample"] = inputs["sample"] + 0.02 * i
                inputs["sample"][1] = inputs["sample"][1].flip(-1)
                outputs.append(unet(**{**inputs, "timestep": torch.tensor(t)}).sample)
                assert not handle.config.watches_output or guidance_map(handle) is None
    for one, other in zip(outputs[: len(STEPS)], outputs[len(STEPS) :]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_random_methods_follow_the_seed(unet):
    for spec in (dict(type="sito", noise_alpha=2), "importance"):
        outputs = []
        for seed in (0, 1, 0):
            with apply_tome(unet, method=spec, ratio=0.5, seed=seed):
                outputs.append(run(unet))
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], outputs[1])


def test_what_a_method_may_draw(unet):
    """Numbers of a block, step and seed; without random destinations the same at every step."""
    cpu = torch.device("cpu")
    handle = apply_tome(unet, method="sito", max_downsample=2)
    (patch,) = handle._patches
    context = patch.context

    def numbers(block, step, **changes):
        context.config, context.step_key = handle.config.replace(**changes), torch.tensor(step)
        return patch.draw(context, patch.blocks[block], cpu, 10, 500)

    first = numbers(0, 900)
    assert first.dtype == torch.int64 and set(first.tolist()) == set(range(10))
    assert torch.equal(numbers(0, 900), first)
    for other in (numbers(1, 900), numbers(0, 800), numbers(0, 900, seed=1)):
        assert not torch.equal(other, first)
    context.clear()

    for use_rand, different in ((True, len(STEPS)), (False, 1)):
        handle, seen = apply_tome(unet, method="sito", use_rand=use_rand), set()
        (patch,) = handle._patches

        def note(module, args, patch=patch, seen=seen):
            seen.add(tuple(patch.draw(patch.context, patch.blocks[0], cpu, 10, 50).tolist()))

        hook = unet.mid_block.register_forward_pre_hook(note)
        run(unet)
        hook.remove()
        assert len(seen) == different


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tofu", "todo", "toma", "sito", "pitome", "importance"])
def test_plans_compile_without_a_break(name):
    """Those left out: threshold breaks the graph, the others do nothing that these do not."""
    torch.compiler.reset()  # another method in the same function would count as a recompilation
    method, ask = build_method(name), request(8, 8, guidance_map=torch.rand(1, 8, 8))

    def target(x):
        plan = method.plan(x, 0.5, ask)
        return plan.unmerge(plan.merge(x).sin())

    x = tokens(2, 8, 8)
    expected = target(x)
    compiled = torch.compile(target, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(share_plans=True, method="tofu"),
        dict(method=dict(attn="todo", mlp="sito"), targets=["attn", "mlp"]),
        dict(ratio=dict(depth=[0.5, 0.25], target={"mlp": 0.25}), targets=["attn", "mlp"]),
    ],
    ids=["one plan for a level", "a method for every target", "a ratio for every block"],
)
def test_one_graph(unet, options):
    """Of what does not depend on the step."""
    torch.compiler.reset()
    apply_tome(unet, **options)
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = unet(**inputs).sample
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).sample, expected)
