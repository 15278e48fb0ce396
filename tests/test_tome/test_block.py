# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How many plans blocks compute, how long they are reused, and at which ratio."""

import pytest
import torch
from denoise import denoise, denoising, inputs_at
from model_runs import Seen
from tiny import error, tiny_inputs, tiny_unet

from mmagic_tome import apply_cache, apply_tome

STEPS = (900, 700, 500, 300, 100)
INPUTS = tiny_inputs()


@torch.no_grad()
def call(unet, time, **changes):
    return unet(**{**inputs_at(INPUTS, time), **changes}).sample


def plans_per_block(handle):
    return sorted({row["plans"] for row in handle.stats()})


# --- how long a plan is reused --------------------------------------------------------------------


def test_a_plan_is_reused_for_so_many_steps(unet):
    with apply_tome(unet):
        plain = denoise(unet, INPUTS, STEPS)
    for interval, made in ((1, 5), (2, 3), (3, 2), (5, 1), (9, 1)):
        with apply_tome(unet, plan_interval=interval) as handle:
            outputs = denoise(unet, INPUTS, STEPS)
            assert plans_per_block(handle) == [made]
            assert torch.equal(outputs, plain) == (interval == 1)
            # ... and the same steps return the same outputs again: a run begins by itself.
            assert torch.equal(denoise(unet, INPUTS, STEPS), outputs)
            assert plans_per_block(handle) == [2 * made]


def test_targets_at_equal_ratios_share_a_plan(unet):
    """Another ratio by depth or by target is another plan, and stays so while it is reused."""
    ratio = dict(depth=[0.5, 0.25, 0.25], target={"mlp": 0.25})
    options = dict(ratio=ratio, targets=["attn", "mlp"], plan_interval=2)
    with apply_tome(unet, **options) as handle:
        for _ in denoising(unet, INPUTS, STEPS[:3]):
            kept = [(row["kind"], row["kept"]) for row in handle.stats()]
            assert kept == [("attn", 128), ("mlp", 192)] + 2 * [("attn", 192), ("mlp", 192)]
        plans = {row["block"]: row["plans"] for row in handle.stats()}
        # At each of the steps 0 and 2, two ratios in the first block and one in the others.
        assert list(plans.values()) == [4, 2, 2]


def test_at_listed_steps(unet):
    steps = (900, 800, 700, 600, 500, 400)
    with apply_tome(unet, plan_interval=[0, 1, 4]) as handle:
        made = [plans_per_block(handle)[0] for _ in denoising(unet, INPUTS, steps)]
        assert made == [1, 2, 2, 2, 3, 3]


def test_a_range_begins_and_ends_at_its_step_though_plans_are_reused(unet):
    """In between, too: a plan is made where merging begins and not used where it ends."""
    ratio = dict(base=0.5, timestep=dict(timestep_range=(0.35, 0.75)))
    with apply_tome(unet, ratio=ratio, plan_interval=8) as handle:
        seen = []
        for _ in denoising(unet, INPUTS):
            row = handle.stats()[0]
            seen.append((row["kept"], row["plans"], row["unmerged_calls"]))
    # 0.9, 0.8 remain | 0.7 to 0.4: four steps with one plan | 0.3, 0.2, 0.1.
    assert [one[2] for one in seen] == [1, 2, 2, 2, 2, 2, 3, 4, 5]
    assert [one[1] for one in seen] == [0, 0] + 7 * [1]
    merged = [one[0] == 128 for one in seen]
    assert merged == 2 * [False] + 4 * [True] + 3 * [False]


def test_what_was_due_while_a_block_did_not_run_is_due_when_it_does(unet):
    """Inner levels run at odd steps only: else their first plan would be reused all along."""
    apply_cache(unet, region="inner", timestep_range=(0.0, 0.9))
    with apply_tome(unet, ratio=0.5, max_downsample=4, plan_interval=2) as handle:
        denoise(unet, INPUTS, range(951, 0, -50))
        made = {row["downsample"]: (row["calls"], row["plans"]) for row in handle.stats()}
    # Steps 0, 1, 2, then 4, 6 and so on: a plan is reused at step 1, the others need their own.
    calls, plans = made[2]
    assert made[1] == (20, 10) and made[4] == (calls, plans)
    assert calls < 13 and plans == calls - 1


def test_training_keeps_nothing(unet):
    handle = apply_tome(unet, plan_interval=5)
    for time in (900, 700):
        unet(**inputs_at(INPUTS, time)).sample.sum().backward()
    assert plans_per_block(handle) == [2]
    assert {row["kept"] for row in handle.stats()} == {128}


def test_two_calls_at_every_step_are_two_branches(unet):
    """As of pipelines that call their network without and with the text."""
    texts = [tiny_inputs(seed=seed)["encoder_hidden_states"] for seed in (1, 2)]
    options = dict(plan_interval=2)

    with apply_tome(unet, **options) as handle:
        for _ in range(2):
            handle.reset_stats()
            latents, outputs = [INPUTS["sample"]], []
            for time, x in zip(STEPS, latents):
                pair = [call(unet, time, sample=x, encoder_hidden_states=text) for text in texts]
                outputs.append(pair)
                latents += [1.02 * x - 0.1 * (3 * pair[1] - 2 * pair[0])]
            # Each branch computes its plans at steps 0, 2 and 4.
            assert plans_per_block(handle) == [2 * 3]
    for branch, text in enumerate(texts):
        with apply_tome(unet, **options):
            for time, x, pair in zip(STEPS, latents, outputs):
                alone = call(unet, time, sample=x, encoder_hidden_states=text)
                assert torch.equal(alone, pair[branch])


# --- ratios, in tokens ----------------------------------------------------------------------------


def test_tokens_by_level(unet):
    with apply_tome(unet, max_downsample=4, ratio=dict(downsample={1: 0.75, 4: 0.25})) as handle:
        call(unet, 900)
        kept = {(row["downsample"], row["tokens"], row["kept"]) for row in handle.stats()}
    # N - int(N * ratio); a level that is not named keeps all.
    assert kept == {(1, 256, 64), (2, 64, 64), (4, 16, 12)}


def test_tokens_by_depth_target_and_timestep_over_a_run(unet):
    """All at once: linear in the depth, a target of its own, both scaled by the timestep."""
    timestep = dict(points=[(0.9, 1), (0.5, 0.5)], timestep_range=(0.2, 1))
    ratio = dict(depth=[0.5, 0.25], target={"mlp": 0.75}, timestep=timestep)

    def by_place(place):
        factor = {0.9: 1, 0.7: 0.75, 0.1: 0}.get(round(place.timestep, 1), 0.5)
        return factor * (0.75 if place.target == "mlp" else 0.5 - 0.125 * place.depth)

    half = [192, 160, 208, 160, 224, 160]
    expected = [[128, 64, 160, 64, 192, 64], [160, 112, 184, 112, 208, 112], half, half, [256] * 6]
    for spec in (ratio, by_place):
        with apply_tome(unet, ratio=spec, targets=["attn", "mlp"]) as handle:
            steps = denoising(unet, INPUTS, STEPS)
            assert [[row["kept"] for row in handle.stats()] for _ in steps] == expected


# --- other targets --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["block", "stack"])
def test_around_whole_blocks(target):
    unet, depth = tiny_unet(levels=2, transformer_layers_per_block=3), 3
    baseline = call(unet, 900)
    names = "transformer_blocks.0.ff.net.0.proj", f"transformer_blocks.{depth - 1}.attn1.to_q"
    seen = Seen(unet, *names)
    with apply_tome(unet, targets=[target], max_downsample=2) as handle:
        merged = call(unet, 900)
        assert [set(seen.lengths(name).values()) for name in names] == [{128, 32}] * 2
        per_stack = 1 if target == "stack" else depth
        assert {row["kind"] for row in handle.stats()} == {target}
        stacks = {row["block"].rsplit(".", 2)[0] for row in handle.stats()}
        assert len(handle.stats()) == per_stack * len(stacks)
    assert 1e-4 < error(merged, baseline) < 1
    assert torch.equal(call(unet, 900), baseline)


@pytest.mark.parametrize("target", ["block", "stack"])
def test_what_comes_into_a_merged_block_passes_unmerged(target):
    """A block that adds nothing returns its input, though it was merged."""
    unet = tiny_unet(levels=2)
    for name, parameter in unet.named_parameters():
        if "transformer_blocks" in name and ("to_out" in name or "ff.net.2" in name):
            torch.nn.init.zeros_(parameter)
    baseline = call(unet, 900)
    with apply_tome(unet, targets=[target], ratio=0.75) as handle:
        torch.testing.assert_close(call(unet, 900), baseline, rtol=1e-5, atol=1e-6)
        assert {row["kept"] for row in handle.stats()} == {64}
