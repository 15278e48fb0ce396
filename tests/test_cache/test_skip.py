# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from mmagic_tome.presets import PRESETS
from mmagic_tome.reuse import Reuse, Scope
from mmagic_tome.temporal import Memory
from mmengine.config import ConfigDict
from support_table import scopes_of
from tiny import QUICK, tiny_inputs, tiny_model, tiny_sd_folder, tiny_unet
from tiny_pipelines import NETWORKS
from tiny_transformers import TRANSFORMERS

from mmagic_tome import ToMeConfig, ToMeError, apply_tome

STEPS = (900, 800, 700, 600, 500, 400, 300, 200, 100)
WIDE = dict(steps=2, between=(0.0, 1.0))


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=3)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


def inputs(step, time, batch=2):
    a = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    b = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sample = a + 0.05 * step * b
    return {**tiny_inputs(), "sample": sample, "timestep": torch.tensor(time)}


@torch.no_grad()
def run(unet, steps=STEPS, **changes):
    outputs = [unet(**{**inputs(i, t), **changes}) for i, t in enumerate(steps)]
    return torch.stack([output[0] for output in outputs])


def error(a, b):
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


# --- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_left_out_steps_are_on_the_polynomial_through_the_last_ones(unet, order):
    dense = run(unet)
    with apply_tome(unet, ratio=0, reuse=dict(network=dict(**WIDE, order=order))) as handle:
        outputs = run(unet)
        seen = handle.scopes()
    out = [step for step in range(order + 1, len(STEPS) - 1, 2)]
    assert seen == [{"scope": "network", "runs": len(STEPS) - len(out), "reused": len(out)}]
    for step in range(len(STEPS)):
        if step not in out:
            assert torch.equal(outputs[step], dense[step]), step
            continue
        known = [i for i in range(step) if i not in out][-1 - order :]
        expected = polynomial(known, dense[known], step)
        torch.testing.assert_close(outputs[step], expected, atol=1e-4, rtol=1e-4)


def polynomial(xs, ys, x):
    """Neville's scheme, another road to the same polynomial."""
    if len(xs) == 1:
        return ys[0]
    a, b = polynomial(xs[:-1], ys[:-1], x), polynomial(xs[1:], ys[1:], x)
    return (a * (x - xs[-1]) - b * (x - xs[0])) / (xs[0] - xs[-1])


@pytest.mark.parametrize("order", [0, 1])
def test_what_was_foretold_wrongly_is_made_good_at_the_next_run(unet, order):
    dense = run(unet)
    scope = dict(**WIDE, order=order, repay=0.5)
    with apply_tome(unet, ratio=0, reuse=dict(network=scope)) as handle:
        outputs = run(unet)
        assert handle.scopes()[0]["reused"] >= 3
        assert torch.equal(run(unet), outputs)
    out = [step for step in range(order + 1, len(STEPS) - 1, 2)]
    for step in range(len(STEPS)):
        if step in out or step - 1 not in out:
            continue
        wrong = (dense[step - 2] + dense[step]) / 2 - outputs[step - 1]
        torch.testing.assert_close(outputs[step], dense[step] + 0.5 * wrong, atol=1e-4, rtol=1e-4)


def test_a_debt_is_forgotten_with_its_run(unet):
    options = dict(ratio=0, reuse=dict(network=dict(**WIDE, repay=1)))
    dense = run(unet)
    with apply_tome(unet, **options):
        run(unet, STEPS[:3])  # ends with a foretold step
        assert torch.equal(run(unet)[:2], dense[:2])


def test_a_number_is_steps_of_the_network(unet):
    assert Reuse.coerce(3) == Reuse(network=Scope(steps=3))
    with apply_tome(unet, ratio=0, reuse=3) as handle:
        run(unet)
        # 900 and 800 are needed first; of the others every third, and the last.
        assert handle.scopes() == [{"scope": "network", "runs": 5, "reused": 4}]


def test_nothing_is_left_out_outside_of_between(unet):
    options = dict(ratio=0, reuse=dict(network=dict(steps=2, between=(0.25, 0.65))))
    dense = run(unet)
    with apply_tome(unet, **options) as handle:
        same = [torch.equal(a, b) for a, b in zip(run(unet), dense)]
        assert handle.scopes()[0]["reused"] == 2
    assert same == [True, True, True, False, True, False, True, True, True]


def test_the_left_out_network_does_not_run(unet):
    calls = []
    unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with apply_tome(unet, ratio=0, reuse=dict(network=WIDE)):
        run(unet)
    assert len(calls) == 6


@pytest.mark.parametrize("changes", [dict(return_dict=False), dict(return_dict=True)])
def test_the_kind_of_output_stays(unet, changes):
    with torch.no_grad(), apply_tome(unet, ratio=0, reuse=dict(network=WIDE)) as handle:
        outputs = [unet(**inputs(i, t), **changes) for i, t in enumerate(STEPS)]
        assert handle.scopes()[0]["reused"] == 3
    assert len({type(output) for output in outputs}) == 1
    assert {output[0].shape for output in outputs} == {(2, 4, 16, 16)}


def test_outputs_may_be_changed_in_place_by_whoever_gets_them(unet):
    options = dict(ratio=0, reuse=dict(network=dict(**WIDE, order=0)))
    with apply_tome(unet, **options):
        expected = run(unet)
        outputs = []
        with torch.no_grad():
            for i, t in enumerate(STEPS):
                output = unet(**inputs(i, t)).sample
                outputs.append(output.clone())
                output.zero_()
    assert torch.equal(torch.stack(outputs), expected)


# --- inner levels -------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [1, 2])
def test_inner_levels_are_left_out_and_outer_ones_run(unet, outer):
    dense = run(unet)
    calls = {"outer": [], "inner": []}
    unet.down_blocks[outer - 1].register_forward_hook(lambda *_: calls["outer"].append(1))
    unet.down_blocks[outer].resnets[0].register_forward_hook(lambda *_: calls["inner"].append(1))
    with apply_tome(unet, ratio=0, reuse=dict(deep=WIDE, outer=outer)) as handle:
        outputs = run(unet)
        assert handle.scopes() == [{"scope": "deep", "runs": 6, "reused": 3}]
    assert (len(calls["outer"]), len(calls["inner"])) == (9, 6)
    changed = [not torch.equal(a, b) for a, b in zip(outputs, dense)]
    assert [i for i, c in enumerate(changed) if c] == [2, 4, 6]
    assert 0 < error(outputs, dense) < 0.3


def test_inner_levels_are_foretold_from_their_last_outputs(unet):
    seen = []
    unet.up_blocks[1].register_forward_hook(lambda m, args, output: seen.append(output))
    with apply_tome(unet, ratio=0, reuse=dict(deep=WIDE)):
        run(unet)
    torch.testing.assert_close(seen[2], 2 * seen[1] - seen[0])
    torch.testing.assert_close(seen[4], seen[3] + (seen[3] - seen[1]) / 2)


def test_both_at_once_leave_out_inner_levels_where_the_network_runs(unet):
    with apply_tome(unet, ratio=0, reuse=dict(network=WIDE, deep=WIDE)) as handle:
        run(unet)
        # Network runs 0 1 3 5 7 8; of those the inner levels 0 1 5 8.
        assert handle.scopes() == [
            {"scope": "network", "runs": 6, "reused": 3},
            {"scope": "deep", "runs": 4, "reused": 2},
        ]


def test_merging_goes_on_in_what_runs(unet):
    options = dict(ratio=0.5, max_downsample=4, refresh=2, reuse=dict(network=WIDE))
    with apply_tome(unet, **options) as handle:
        run(unet)
        # Six runs of the network, so three plans each: a left out step counts for nothing.
        assert {row["plans"] for row in handle.stats()} == {3}
        assert {row["calls"] for row in handle.stats()} == {6}
        assert "network: ran 6 times, output foretold 3 times" in handle.summary()


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [dict(network=WIDE), dict(deep=WIDE)])
def test_a_run_begins_anew_by_itself(unet, reuse):
    with apply_tome(unet, ratio=0, reuse=reuse):
        first = run(unet)
        assert torch.equal(run(unet), first)
        with torch.no_grad():
            other = unet(**inputs(0, 50)).sample  # lower than the last, but the size changes
            smaller = inputs(0, 40)
            smaller["sample"] = smaller["sample"][..., :8, :8]
            assert unet(**smaller).sample.shape[-1] == 8
        assert other.shape[-1] == 16
        assert torch.equal(run(unet), first)


@pytest.mark.parametrize("reuse", [dict(network=WIDE), dict(deep=WIDE)])
def test_removal_is_exact_and_leaves_nothing_behind(unet, reuse):
    dense = run(unet)
    handle = apply_tome(unet, ratio=0, reuse=reuse)
    assert not torch.equal(run(unet), dense)
    handle.remove()
    assert torch.equal(run(unet), dense)
    assert not [name for name, module in unet.named_modules() if "forward" in module.__dict__]


def test_with_gradients_everything_runs(unet):
    with apply_tome(unet, ratio=0, reuse=dict(network=WIDE, deep=WIDE)) as handle:
        for i, t in enumerate(STEPS):
            unet(**inputs(i, t)).sample.sum().backward()
        assert all(row["reused"] == 0 for row in handle.scopes())
    assert unet.conv_in.weight.grad is not None


def test_copies_are_independent_and_pickles_work(unet):
    apply_tome(unet, ratio=0, reuse=dict(network=WIDE, deep=WIDE))
    expected = run(unet)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert other.forward.module is other
        assert torch.equal(run(other), expected)
        other.conv_in.weight.data.zero_()
        assert not torch.equal(run(other), expected)
        assert torch.equal(run(unet), expected)


def test_threads_have_runs_of_their_own(unet):
    with apply_tome(unet, ratio=0, reuse=dict(network=WIDE)):
        expected = run(unet)
        results = {}

        def work(name):
            results[name] = run(unet)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert all(torch.equal(results[name], expected) for name in range(2))


def test_an_exception_leaves_the_model_usable(unet):
    with apply_tome(unet, ratio=0, reuse=dict(network=WIDE)):
        expected = run(unet)
        hook = unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(unet)
        hook.remove()
        assert torch.equal(run(unet), expected)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_beside_hooks_that_replace_forward(unet, first):
    hooks = pytest.importorskip("accelerate.hooks")
    with apply_tome(unet, ratio=0, reuse=dict(network=WIDE)):
        expected = run(unet)
    dense = run(unet)
    if first == "theirs":
        hooks.add_hook_to_module(unet, hooks.ModelHook())
    handle = apply_tome(unet, ratio=0, reuse=dict(network=WIDE))
    if first == "ours":
        hooks.add_hook_to_module(unet, hooks.ModelHook())
    assert torch.equal(run(unet), expected)
    handle.remove()
    assert torch.equal(run(unet), dense)


def test_the_outer_reuse_comes_back_after_a_nested_with(unet):
    with apply_tome(unet, ratio=0, reuse=dict(network=WIDE)):
        expected = run(unet)
        with apply_tome(unet, ratio=0.5):
            assert not torch.equal(run(unet), expected)
        assert torch.equal(run(unet), expected)


def test_ratio_zero_alone_is_dense_and_stays_so(unet):
    dense = run(unet)
    with apply_tome(unet, ratio=0):
        assert torch.equal(run(unet), dense)


# --- presets and bad input ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_something_out(unet, name):
    times = tuple(range(980, 0, -50))
    dense = run(unet, times)
    with apply_tome(unet, preset=name) as handle:
        outputs = run(unet, times)
        assert sum(row["reused"] for row in handle.scopes()) > 2
    assert 0 < error(outputs, dense) < 0.3


def test_what_stands_beside_a_preset_wins():
    config = ToMeConfig.from_dict(dict(preset="balanced", ratio=0.25, seed=3))
    assert (config.ratio, config.seed) == (0.25, 3)
    assert config.reuse_plan.network.steps == 2
    assert ToMeConfig.from_dict(config.to_dict()) == config
    assert ToMeConfig().replace(preset="balanced").ratio == 0


def test_dicts_beside_a_preset_win_key_by_key():
    """One setting of a preset can be changed without knowing the others."""
    before = ToMeConfig(**PRESETS["balanced"]).reuse_plan
    reuse = dict(network=dict(repay=0), deep=dict(steps=3))
    plan = ToMeConfig.from_dict(dict(preset="balanced", reuse=reuse)).reuse_plan
    assert plan.network == replace(before.network, repay=0)
    assert plan.deep == replace(before.deep, steps=3)
    # A number stands for a scope as a whole, None for none.
    plan = ToMeConfig.from_dict(
        dict(preset="balanced", reuse=dict(network=3, deep=None))
    ).reuse_plan
    assert plan == Reuse(network=3)
    assert ToMeConfig.from_dict(dict(preset="balanced", reuse=2)).reuse_plan == Reuse(network=2)
    assert ToMeConfig.from_dict(dict(preset="balanced", reuse=None)).reuse_plan is None
    assert ToMeConfig(**PRESETS["balanced"]).reuse_plan == before
    # As mmengine hands it over.
    given = ConfigDict(preset="balanced", reuse=dict(network=dict(repay=0)))
    assert ToMeConfig.from_dict(given).reuse_plan.network.between == before.network.between


def test_a_controlnet_leaves_out_what_it_can():
    config = ToMeConfig.from_dict(dict(preset="fast", controlnet=True))
    assert set(config.controlnet_config.reuse_plan.scopes) == {"network"}
    config = ToMeConfig.from_dict(dict(preset="quality", controlnet=True))
    assert config.controlnet_config.reuse_plan is None


@pytest.mark.parametrize(
    ("reuse", "words"),
    [
        (1, "every part runs"),
        (0, "steps=0"),
        (True, "reuse=True"),
        ("deep", "reuse='deep'"),
        (dict(netwerk=2), "netwerk"),
        (dict(network=dict(step=2)), "step"),
        (dict(network=dict(steps=2, order=3)), "order=3"),
        (dict(network=dict(steps=2, repay=2)), "repay=2"),
        (dict(network=dict(steps=2, between=(0.5, 0.5))), "between"),
        (dict(network=dict(steps=2, between=0.5)), "between"),
        (dict(network=dict(steps=2, between=(0, 1000))), "between"),
        (dict(deep=2, outer=0), "outer=0"),
    ],
)
def test_bad_reuse_is_refused(reuse, words):
    with pytest.raises(ToMeError, match=words):
        ToMeConfig(reuse=reuse)


def test_unknown_presets_are_refused():
    with pytest.raises(ToMeError, match="write preset='balanced'"):
        ToMeConfig.from_dict(dict(preset="balance"))


def test_a_network_without_inner_levels_is_refused(unet):
    with pytest.raises(ToMeError, match=r"(?s)inside the.*3 outermost"):
        apply_tome(unet, ratio=0, reuse=dict(deep=2, outer=3))
    assert not unet._forward_pre_hooks


def test_a_parabola_goes_through_what_is_known():
    memory = Memory()
    for x in (4.0, 3.0, 1.0):
        memory.keep(x, torch.tensor([x * x - x]), 2)
    assert memory.predict(0.5, 2).item() == pytest.approx(0.25 - 0.5)
    assert memory.predict(2.0, 0).item() == 0.0


# --- other networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMERS.values(), ids=lambda family: family.title)
def test_transformers(family):
    network = family.deeper(4).build()
    scopes = dict(network=dict(network=WIDE), deep=dict(deep=WIDE))

    @torch.no_grad()
    def outputs():
        found = [network(**family.inputs(time=t))[0] for t in STEPS]
        return torch.stack([torch.stack(x) if isinstance(x, list) else x for x in found])

    dense = outputs()
    for name, reuse in scopes.items():
        with apply_tome(network, ratio=0, reuse=reuse) as handle:
            reused = outputs()
            assert handle.scopes() == [{"scope": name, "runs": 6, "reused": 3}]
        same = [torch.equal(a, b) for a, b in zip(reused, dense)]
        assert same == [step not in (2, 4, 6) for step in range(9)], name
        if name == "network":
            torch.testing.assert_close(reused[2], 2 * dense[1] - dense[0])
    assert torch.equal(outputs(), dense)


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)
def test_unets(kind):
    network = (kind.layered or kind.build)()
    scopes = scopes_of(network)
    assert scopes == (["network"] if kind.title == "ControlNet" else ["network", "deep"])

    @torch.no_grad()
    def outputs():
        found = []
        for t in STEPS:
            given = {**kind.inputs(), "timestep": torch.tensor(t)}
            out = network(**given, return_dict=False)[0]
            found.append(out[-1] if isinstance(out, list) else out)  # a ControlNet's levels
        return found

    dense = outputs()
    for name in scopes:
        with apply_tome(network, ratio=0, reuse={name: WIDE}) as handle:
            reused = outputs()
            assert handle.scopes() == [{"scope": name, "runs": 6, "reused": 3}]
        same = [torch.equal(a, b) for a, b in zip(reused, dense)]
        assert same == [step not in (2, 4, 6) for step in range(9)], name
    assert all(torch.equal(a, b) for a, b in zip(outputs(), dense))


def test_mmagics_own_unet(tmp_path):
    tiny_sd_folder(tmp_path)
    model = tiny_model("native", tmp_path)
    options = {**QUICK, "num_inference_steps": 8, "return_type": "tensor"}

    def picture():
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        return model.infer("a tree", latents=latents, **options)["samples"]

    dense = picture()
    with apply_tome(model, preset="fast") as handle:
        assert not torch.equal(picture(), dense)
        assert handle.scopes()[0]["reused"] >= 2
    assert torch.equal(picture(), dense)
