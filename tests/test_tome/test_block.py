# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import json

import pytest
import torch
from mmagic_tome.temporal import Memory, Refresh, Residual, Run
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeConfig, ToMeError, apply_tome

STEPS = (900, 700, 500, 300, 100)


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=3)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


def drift(step, size=16, batch=2):
    """Inputs that change a little from step to step, as those of a denoising run do."""
    a = torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(0))
    b = torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(1))
    return a + 0.05 * step * b


@torch.no_grad()
def run(unet, steps=STEPS, **changes):
    outputs = []
    for i, t in enumerate(steps):
        inputs = {**tiny_inputs(), "sample": drift(i), "timestep": torch.tensor(t), **changes}
        outputs.append(unet(**inputs).sample)
    return torch.stack(outputs)


def error(a, b):
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def plans_per_block(handle):
    return sorted({row["plans"] for row in handle.stats()})


# --- refresh ------------------------------------------------------------------------------------


def test_one_step_is_the_default_to_the_bit(unet):
    with apply_tome(unet):
        plain = run(unet)
    with apply_tome(unet, refresh=dict(steps=1)):
        assert torch.equal(run(unet), plain)


@pytest.mark.parametrize(("steps", "made"), [(1, 5), (2, 3), (3, 2), (5, 1), (9, 1)])
def test_a_plan_serves_so_many_steps(unet, steps, made):
    with apply_tome(unet, refresh=steps) as handle:
        outputs = run(unet)
        assert plans_per_block(handle) == [made]
        # ... and the same steps give the same outputs again: a run starts anew by itself.
        assert torch.equal(run(unet), outputs)
        assert plans_per_block(handle) == [2 * made]


def test_one_plan_for_a_level(unet):
    options = dict(max_downsample=2, merge_mlp=True)
    with apply_tome(unet, refresh=dict(steps=2, share="level"), **options) as handle:
        outputs = run(unet)
        made = {}
        for row in handle.stats():
            made.setdefault(row["downsample"], {})[row["block"]] = row["plans"]
        # One matching of the level for all kinds of site.
        assert [sum(blocks.values()) for blocks in made.values()] == [3, 3]
        assert [max(blocks.values()) for blocks in made.values()] == [3, 3]
        assert {row["kept"] / row["tokens"] for row in handle.stats()} == {0.5}
    assert error(outputs, run(unet)) < 0.5


def test_one_plan_for_a_level_at_every_step(unet):
    with apply_tome(unet, refresh=dict(share="level")) as handle:
        shared = run(unet)
        assert [row["plans"] for row in handle.stats()] == [len(STEPS), 0, 0]
        assert not handle._state.forward.run.plans  # nothing is kept beyond its step
    with apply_tome(unet):
        apart = run(unet)
    assert 1e-5 < error(shared, apart) < 0.5


def test_blocks_of_a_level_share_at_equal_ratios_only(unet):
    """Another ratio by depth or by site is another plan, and stays so until the next refresh."""
    ratio = dict(depth=[0.5, 0.25, 0.25], site={"mlp": 0.25})
    options = dict(ratio=ratio, merge_mlp=True, refresh=dict(steps=2, share="level"))
    with apply_tome(unet, **options) as handle:
        for i, t in enumerate(STEPS[:3]):
            run_one(unet, i, t)
            kept = [(row["kind"], row["kept"]) for row in handle.stats()]
            assert kept == [("attn", 128), ("mlp", 192)] + 2 * [("attn", 192), ("mlp", 192)]
        plans = {row["block"]: row["plans"] for row in handle.stats()}
        assert list(plans.values()) == [4, 0, 0]  # two ratios at each of two refreshes


def test_at_listed_steps(unet):
    """The caching of CA-ToMe."""
    at = [0, 1, 4]
    with apply_tome(unet, refresh=dict(at=at)) as handle:
        made = []
        for i, t in enumerate((900, 800, 700, 600, 500, 400)):
            run_one(unet, i, t)
            made.append(plans_per_block(handle)[0])
        assert made == [1, 2, 2, 2, 3, 3]
        assert "refreshed at steps 0, 1, 4" in handle.description
    with apply_tome(unet, refresh=dict(at=at), residual="exact") as handle:
        dense = []
        for i, t in enumerate((900, 800, 700, 600, 500, 400)):
            run_one(unet, i, t)
            dense.append(handle.stats()[0]["dense_calls"])
        assert dense == [1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("residual", [None, "exact", "own"])
def test_a_noise_window_opens_and_closes_at_its_step_whatever_serves_on(unet, residual):
    """Between refreshes, too: a plan is made where merging begins and not used where it ends."""
    ratio = dict(base=0.5, noise=dict(between=(0.35, 0.75)))
    with apply_tome(unet, ratio=ratio, refresh=8, residual=residual) as handle:
        kept = []
        for i, t in enumerate(range(900, 0, -100)):
            run_one(unet, i, t)
            row = handle.stats()[0]
            kept.append((row["kept"], row["plans"], row["dense_calls"]))
    if residual is None:
        # Noise 0.9, 0.8 | 0.7 to 0.4: four steps on one plan | 0.3, 0.2, 0.1.
        dense = [1, 2, 2, 2, 2, 2, 3, 4, 5]
    else:
        # ... which a residual needs a dense step for.
        dense = [1, 2, 3, 3, 3, 3, 4, 5, 6]
    assert [one[2] for one in kept] == dense
    assert [one[1] for one in kept] == [0, 0] + 7 * [1]
    merged = [one[0] == 128 for one in kept]
    assert merged == [False, False, residual is None, True, True, True, False, False, False]


def test_what_was_due_while_a_block_did_not_run_is_due_when_it_does(unet):
    """Inner levels that run at odd steps only: else their first plan would serve the whole run."""
    reuse = dict(deep=dict(steps=2, between=(0.0, 0.9)))
    with apply_tome(unet, ratio=0.5, max_downsample=4, refresh=2, reuse=reuse) as handle:
        run(unet, range(951, 0, -50))
        made = {row["downsample"]: (row["calls"], row["plans"]) for row in handle.stats()}
    # Steps 0, 1, then 3, 5 and so on: a plan serves the first two, the others need their own.
    assert made[1] == (20, 10) and made[2] == made[4] == (11, 10)

    plan = Refresh(steps=4)
    assert [plan.overdue(5, step, 0) for step in (6, 7, 8, 9, 13)] == [0, 0, 1, 1, 1]
    assert Refresh(at=[0, 3]).overdue(1, 4, 0) and not Refresh(at=[0, 3]).overdue(3, 4, 0)


def test_in_turn(unet):
    seen = []
    with apply_tome(unet, refresh=dict(steps=3, stagger=True)) as handle:
        for i, t in enumerate((900, 800, 700, 600, 500, 400, 300)):
            run_one(unet, i, t)
            seen.append(sum({r["block"]: r["plans"] for r in handle.stats()}.values()))
            handle_plans = [r["plans"] for r in handle.stats()]
        assert handle_plans == [3, 3, 3]
    # Three blocks: all at the first step, then one of them at every step.
    assert [b - a for a, b in zip([0, *seen], seen)] == [3, 1, 1, 1, 1, 1, 1]


@torch.no_grad()
def run_one(unet, i, t, **changes):
    inputs = {**tiny_inputs(), "sample": drift(i), "timestep": torch.tensor(t), **changes}
    return unet(**inputs).sample


def test_a_new_run_never_sees_an_old_plan(unet):
    with apply_tome(unet, refresh=5) as handle:
        fresh = run_one(unet, 0, 900)
        run_one(unet, 1, 700)
        assert plans_per_block(handle) == [1]
        for change in (
            dict(t=900),  # back
            dict(t=900),  # the same once more
            dict(t=700, sample=drift(0, batch=3), encoder_hidden_states=torch.randn(3, 5, 32)),
            dict(t=600, sample=drift(0, size=24)),
        ):
            before = plans_per_block(handle)[0]
            t = change.pop("t")
            if "encoder_hidden_states" in change:
                context = tiny_inputs()["encoder_hidden_states"]
                change["encoder_hidden_states"] = context[:1].expand(3, -1, -1)
            run_one(unet, 0, t, **change)
            assert plans_per_block(handle) == [before + 1], change
        assert torch.equal(run_one(unet, 0, 900), fresh)


def test_a_forward_that_failed_ends_the_run(unet):
    with apply_tome(unet, refresh=5) as handle:
        run_one(unet, 0, 900)
        broken = unet.mid_block.register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_one(unet, 1, 800)
        broken.remove()
        assert plans_per_block(handle) == [1]
        run_one(unet, 2, 700)
        assert plans_per_block(handle) == [2]


def test_training_keeps_nothing(unet):
    handle = apply_tome(unet, refresh=5, residual="exact")
    for i, t in enumerate((900, 700)):
        inputs = {**tiny_inputs(), "sample": drift(i), "timestep": torch.tensor(t)}
        unet(**inputs).sample.sum().backward()
    assert plans_per_block(handle) == [2]
    assert {row["kept"] for row in handle.stats()} == {128}
    assert not handle._state.forward.run.memories


def test_reset_starts_a_run(unet):
    with apply_tome(unet, refresh=5) as handle:
        run_one(unet, 0, 900)
        handle.reset()
        run_one(unet, 1, 700)
        assert plans_per_block(handle) == [1]


def test_ratio_by_level_and_noise_in_tokens(unet):
    ratio = dict(level={1: 0.5, 2: 0.25}, noise=dict(between=(0.4, 1)))
    kept = []
    with apply_tome(unet, max_downsample=4, ratio=ratio) as handle:
        for i, t in enumerate(STEPS):
            run_one(unet, i, t)
            kept.append({row["downsample"]: row["kept"] for row in handle.stats()})
    # 256, 64 and 16 tokens; no ratio for the coarsest level, and none below noise 0.4.
    on, off = {1: 128, 2: 48, 4: 16}, {1: 256, 2: 64, 4: 16}
    assert kept == [on, on, on, off, off]


# What is kept of the 256, 64 and 16 tokens of the three levels, step by step (noise 0.9, 0.7, 0.5,
# 0.3, 0.1): N - int(N * ratio).
BY_STEP = {
    "number": (0.5, [(128, 32, 8)] * 5),
    "level": (dict(level={1: 0.75, 4: 0.25}), [(64, 64, 12)] * 5),
    "linear": (
        dict(base=0.5, noise=dict(kind="linear")),
        [(141, 36, 9), (167, 42, 11), (192, 48, 12), (218, 55, 14), (244, 61, 16)],
    ),
    "linear, rising": (
        dict(base=0.5, noise=dict(kind="linear", start=0, end=1)),
        [(244, 61, 16), (218, 55, 14), (192, 48, 12), (167, 42, 11), (141, 36, 9)],
    ),
    "cosine": (
        dict(base=0.5, noise=dict(kind="cosine")),
        [(132, 33, 9), (155, 39, 10), (192, 48, 12), (230, 58, 15), (253, 64, 16)],
    ),
    "piecewise": (
        dict(level={1: 0.5, 2: 0.25}, noise=dict(points=[(0.9, 1), (0.5, 0.5), (0.3, 0)])),
        [(128, 48, 16), (160, 52, 16), (192, 56, 16), (256, 64, 16), (256, 64, 16)],
    ),
    "off after": (
        dict(base=0.5, noise=dict(between=(0.4, 1))),
        [(128, 32, 8)] * 3 + [(256, 64, 16)] * 2,
    ),
    "only between": (
        dict(base=0.5, noise=dict(between=(0.2, 0.6))),
        [(256, 64, 16)] * 2 + [(128, 32, 8)] * 2 + [(256, 64, 16)],
    ),
    "each level at its own noise": (
        dict(base=0.5, noise=dict(level={1: dict(between=(0.4, 1)), 2: dict(between=(0, 0.4))})),
        [(128, 64, 8)] * 3 + [(256, 32, 8)] * 2,
    ),
    "callable": (
        lambda place: 0.5 if place.noise > 0.4 and place.downsample < 4 else 0.25,
        [(128, 32, 12)] * 3 + [(192, 48, 12)] * 2,
    ),
}


@pytest.mark.parametrize("name", BY_STEP)
def test_tokens_by_step_and_level(unet, name):
    ratio, expected = BY_STEP[name]
    kept = []
    with apply_tome(unet, max_downsample=4, ratio=ratio) as handle:
        for i, t in enumerate(STEPS):
            run_one(unet, i, t)
            levels = {row["downsample"]: set() for row in handle.stats()}
            for row in handle.stats():
                levels[row["downsample"]].add(row["kept"])
            kept.append(tuple(levels[level].pop() for level in sorted(levels)))
            assert not any(levels.values())  # all blocks of a level alike
    assert kept == expected


def test_tokens_by_depth_and_site_of_a_callable(unet):
    def ratio(place):
        return {"attn": 0.5, "crossattn": 0.0, "mlp": 0.25}[place.site] * (place.depth != 1)

    options = dict(merge_crossattn=True, merge_mlp=True)
    with apply_tome(unet, ratio=ratio, **options) as handle:
        run_one(unet, 0, 900)
        kept = [row["kept"] for row in handle.stats()]
    assert kept == [128, 256, 192] + [256] * 3 + [128, 256, 192]


def test_ratio_by_site_and_depth_in_tokens(unet):
    ratio = dict(depth=[0.5, 0.25], site={"mlp": 0.75})
    with apply_tome(unet, ratio=ratio, merge_mlp=True) as handle:
        run_one(unet, 0, 900)
        kept = [(row["kind"], row["kept"]) for row in handle.stats()]
    assert kept == [
        ("attn", 128), ("mlp", 64), ("attn", 160), ("mlp", 64), ("attn", 192), ("mlp", 64)
    ]  # fmt: skip


def test_tokens_by_depth_site_and_noise_over_a_run(unet):
    """All at once: a line over the depth, a site of its own, both scaled by the noise."""
    noise = dict(points=[(0.9, 1), (0.5, 0.5)], between=(0.2, 1))
    ratio = dict(depth=[0.5, 0.25], site={"mlp": 0.75}, noise=noise)
    kept = []
    with apply_tome(unet, ratio=ratio, merge_mlp=True) as handle:
        for i, t in enumerate(STEPS):
            run_one(unet, i, t)
            rows = handle.stats()
            by_kind = [[row["kept"] for row in rows if row["kind"] == k] for k in ("attn", "mlp")]
            kept.append(tuple(tuple(column) for column in by_kind))
    half = ((192, 208, 224), (160, 160, 160))
    assert kept == [
        ((128, 160, 192), (64, 64, 64)),
        ((160, 184, 208), (112, 112, 112)),
        half,
        half,
        ((256, 256, 256), (256, 256, 256)),
    ]


# --- sites --------------------------------------------------------------------------------------


class Inside:
    def __init__(self, unet, suffix):
        self.tokens = set()
        for name, module in unet.named_modules():
            if name.endswith(suffix):
                module.register_forward_pre_hook(lambda m, args: self.tokens.add(args[0].shape[1]))


def test_keys_and_values_only(unet):
    dense = run(unet)
    queries, keys = Inside(unet, "attn1.to_q"), Inside(unet, "attn1.to_k")
    with apply_tome(unet, sites="attn_kv", max_downsample=4):
        merged = run(unet)
    assert queries.tokens == {256, 64, 16} and keys.tokens == {128, 32, 8}
    assert 1e-4 < error(merged, dense) < 0.5


@pytest.mark.parametrize("depth", [2, 10])  # SDXL's stacks
@pytest.mark.parametrize("site", ["block", "stack"])
def test_around_whole_blocks(site, depth):
    unet = tiny_unet(levels=2, transformer_layers_per_block=depth)
    dense = run(unet)
    first = Inside(unet, "transformer_blocks.0.ff.net.0.proj")
    last = Inside(unet, f"transformer_blocks.{depth - 1}.attn1.to_q")
    with apply_tome(unet, sites=[site], max_downsample=2) as handle:
        merged = run(unet)
        assert first.tokens == last.tokens == {128, 32}
        per_step = 1 if site == "stack" else depth
        assert {row["kind"] for row in handle.stats()} == {site}
        stacks = {row["block"].rsplit(".", 2)[0] for row in handle.stats()}
        assert len(handle.stats()) == per_step * len(stacks)
    assert 1e-4 < error(merged, dense) < (0.6 if depth == 2 else 1)
    assert torch.equal(run(unet), dense)


@pytest.mark.parametrize("site", ["block", "stack"])
def test_what_comes_into_a_merged_block_passes_unmerged(site):
    """A block that adds nothing gives back its input to the bit, though it was merged."""
    unet = tiny_unet(levels=2)
    for name, parameter in unet.named_parameters():
        if "transformer_blocks" in name and ("to_out" in name or "ff.net.2" in name):
            torch.nn.init.zeros_(parameter)
    dense = run(unet)
    with apply_tome(unet, sites=[site], ratio=0.75):
        torch.testing.assert_close(run(unet), dense, rtol=1e-5, atol=1e-6)


# --- residuals ----------------------------------------------------------------------------------

ALL = dict(sites=["attn", "crossattn", "mlp"], max_downsample=4, ratio=0.75)


@pytest.mark.parametrize("site", ["attn", "attn_kv", "mlp", "block", "stack"])
@pytest.mark.parametrize("kind", ["own", "exact", "reuse"])
def test_refresh_steps_are_dense_to_the_bit(unet, site, kind):
    if (kind, site) == ("own", "attn_kv"):
        return
    dense = run(unet, steps=STEPS[:2])
    with apply_tome(unet, sites=[site], refresh=2, residual=kind) as handle:
        outputs = run(unet, steps=STEPS[:2])
        row = handle.stats()[0]
        assert (row["calls"], row["dense_calls"]) == (2, 1)
        assert row["kept"] == (0 if kind == "reuse" else 128)
    assert torch.equal(outputs[0], dense[0])
    assert 1e-5 < error(outputs[1], dense[1]) < 0.5


@pytest.mark.parametrize("site", ["attn", "attn_kv", "crossattn", "block", "stack"])
@pytest.mark.parametrize("kind", ["exact", "reuse"])
def test_where_nothing_changes_nothing_is_lost(unet, site, kind):
    """The same input at the next timestep: what the residual restores is all of it.

    The timestep itself changes what the convolutions give the blocks, so it is held there.
    """
    options = dict(sites=[site], max_downsample=4, ratio=0.75, use_rand=False)
    same = dict(sample=drift(0))
    embedding = unet.time_embedding.register_forward_hook(lambda m, a, out: torch.ones_like(out))
    dense = run(unet, steps=(900, 800), **same)
    with apply_tome(unet, refresh=2, residual=kind, **options):
        outputs = run(unet, steps=(900, 800), **same)
    with apply_tome(unet, **options):
        plain = run(unet, steps=(900, 800), **same)
    embedding.remove()
    assert torch.equal(dense[0], dense[1])
    torch.testing.assert_close(outputs[1], dense[1], rtol=1e-4, atol=1e-5)
    assert error(plain[1], dense[1]) > 1e-3


def test_residuals_beat_plain_merging(unet):
    dense = run(unet)
    with apply_tome(unet, **ALL):
        plain = error(run(unet), dense)
    for kind in ("own", "exact"):
        with apply_tome(unet, refresh=2, residual=kind, **ALL):
            assert error(run(unet), dense) < 0.6 * plain, kind
    for order in (1, 2):
        # Dense until there is enough to go on from, then extrapolated at every second step.
        refresh, residual = dict(steps=2, warmup=order + 1), dict(kind="exact", order=order)
        # The same destinations at every step: what changes from plan to plan is no trend.
        with apply_tome(unet, refresh=refresh, residual=residual, use_rand=False, **ALL):
            outputs = run(unet)
        assert torch.equal(outputs[order], dense[order])
        assert not torch.equal(outputs[3], dense[3])
        assert error(outputs, dense) < 0.6 * plain, order


def test_everything_that_changes_linearly_is_extrapolated():
    memory, residual = Memory(), Residual("exact", order=1)
    at = {t: torch.tensor([2.0 * t + 1, -t]) for t in (1.0, 0.8, 0.5, 0.3)}
    memory.keep(1.0, at[1.0], 1)
    assert torch.equal(residual.predict(memory, 0.8), at[1.0])
    memory.keep(0.8, at[0.8], 1)
    torch.testing.assert_close(residual.predict(memory, 0.5), at[0.5])
    memory.keep(0.5, at[0.5], 1)
    torch.testing.assert_close(residual.predict(memory, 0.3), at[0.3])
    assert len(memory._residuals) == 2
    half = Residual("exact", order=0, gain=0.5)
    assert torch.equal(half.predict(memory, 0.3), at[0.5] * 0.5)


def test_order_zero_keeps_one_tensor(unet):
    with apply_tome(unet, refresh=2, residual="own") as handle:
        run(unet)
        memories = handle._state.forward.run.memories
        assert [len(m._residuals) for m in memories.values()] == [1, 1, 1]


def test_two_networks_share_nothing(unet):
    handle = apply_tome(unet, refresh=2, residual="exact")
    outputs = run(unet)
    other = copy.deepcopy(unet)
    run_one(unet, 0, 900)
    assert torch.equal(run(other), outputs)
    assert handle.active


# --- options ------------------------------------------------------------------------------------


def test_round_trip():
    config = ToMeConfig(
        ratio=dict(level={1: 0.5}, noise=dict(kind="linear")),
        sites=["attn", "mlp"],
        refresh=Refresh(steps=2, warmup=2),
        residual=Residual("own", order=1),
        method=dict(type="tome"),
    )
    assert ToMeConfig.from_dict(config.to_dict()) == config
    plain = dict(steps=2, share="site", stagger=False, warmup=2, at=None)
    assert config.to_dict()["refresh"] == plain
    assert config.replace(seed=3).residual_plan == Residual("own", order=1)


@pytest.mark.parametrize("at", [(8, 0, 3, 3), [0, 3, 8]])
def test_listed_steps_survive_json(at):
    config = ToMeConfig(refresh=dict(at=at))
    again = ToMeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.refresh_plan.at == (0, 3, 8) and again.tracks_steps
    assert ToMeConfig(refresh=Refresh(at=at)).refresh_plan == config.refresh_plan


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(refresh=dict(at=[])), "at=[0, 8, 11, 13, 20]"),
        (dict(refresh=dict(at=5)), "list of step numbers"),
        (dict(refresh=dict(at=[0, -1])), "list of step numbers"),
        (dict(refresh=dict(at=[0, 2.5])), "list of step numbers"),
        (dict(refresh=dict(at="05")), "list of step numbers"),
        (dict(refresh=dict(at=[0, 5], steps=2)), "leave out steps"),
        (dict(refresh=dict(at=[0, 5], stagger=True)), "stagger"),
        (dict(refresh=0), "steps=1"),
        (dict(refresh=True), "refresh=True"),
        (dict(refresh=dict(step=2)), "no key 'step'"),
        (dict(refresh=dict(share="all")), "site, level"),
        (dict(refresh=dict(steps=2, stagger=True, share="level")), "share='site'"),
        (dict(refresh=dict(steps=2, warmup=0)), "warmup=1"),
        (dict(residual="own"), "refresh=dict(steps=2)"),
        (dict(refresh=2, residual="all"), "own, exact, reuse"),
        (dict(refresh=2, residual=dict(order=3)), "0, 1 or 2"),
        (dict(refresh=2, residual=dict(gain=0)), "gain=1.0"),
        (dict(refresh=2, residual=3), "dict(kind='exact', order=1)"),
        (dict(refresh=2, residual="own", sites="attn_kv"), "residual='exact'"),
        (dict(sites=[]), "sites=['attn']"),
        (dict(sites="atn"), "attn"),
        (dict(sites=["block", "mlp"]), "sites=['block']"),
        (dict(sites=["attn", "attn_kv"]), "write one"),
        (dict(refresh=dict(share="levels")), "write share='level'"),
        (dict(refresh=dict(step=2)), "did you mean 'steps'"),
        (dict(residual="extact"), "write kind='exact'"),
        (dict(residual=dict(kind="own", gains=1)), "did you mean 'gain'"),
        (dict(ratio=dict(base=0.5, noise=dict(kind="cosin"))), "write kind='cosine'"),
        (dict(method="tomme"), "did you mean 'tome'"),
        (dict(method=dict(name="tome")), "under 'type'"),
        (dict(method=dict(type="tome", window=3)), "window"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ToMeError) as error:
        ToMeConfig(**options)
    assert said in str(error.value)


def test_two_calls_at_every_step_are_two_runs(unet):
    """As of pipelines that call their network without and with the text."""
    contexts = [tiny_inputs(seed=s)["encoder_hidden_states"] for s in (1, 2)]
    options = dict(refresh=2, residual="exact")
    apart = []
    for context in contexts:
        with apply_tome(unet, **options):
            apart.append(run(unet, encoder_hidden_states=context))
    with apply_tome(unet, **options) as handle:
        for _ in range(2):
            handle.reset()
            for i, t in enumerate(STEPS):
                for lane, context in enumerate(contexts):
                    out = run_one(unet, i, t, encoder_hidden_states=context)
                    assert torch.equal(out, apart[lane][i])
        assert plans_per_block(handle) == [2 * 3]


def test_one_step_pictures_are_never_one_run(unet):
    with apply_tome(unet, refresh=5) as handle:
        for count in range(1, 6):
            run_one(unet, count, 999)
            assert plans_per_block(handle) == [count]
        assert len(handle._state.forward.lanes.runs) <= 2


@pytest.mark.parametrize("options", [dict(refresh=5), dict(refresh=3, residual="exact")])
def test_a_run_after_one_that_stopped_at_the_first_step(unet, options):
    """Its first call is at the same timestep, as the second of a pipeline with two calls is; what
    comes after must not take it for that, nor go on with what the stopped run left."""
    with apply_tome(unet, **options):
        alone = run(unet)
    with apply_tome(unet, **options) as handle:
        run_one(unet, 3, STEPS[0])  # of another picture
        assert torch.equal(run(unet), alone)
        assert len(handle._state.forward.lanes.runs) == 1


def test_two_calls_from_the_second_step_on_are_two_runs(unet):
    """Samplers that correct every step call the network twice at all timesteps but the first, with
    another picture each."""
    with apply_tome(unet, refresh=9) as handle:
        run_one(unet, 0, STEPS[0])
        for i, t in enumerate(STEPS[1:], 1):
            run_one(unet, i, t)
            run_one(unet, 7 + i, t)
        assert plans_per_block(handle) == [2]


def test_a_run_falls():
    run = Run()
    run.begin_step(900, "a")
    run.begin_step(800, "a")
    assert run.step == 1
    run.begin_step(800, "a")
    assert run.step == 0
    run.begin_step(700, "b")
    assert run.step == 0
    run.begin_step(None, "b")
    assert run.step == 0
