# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is compared, and that a model is dense again after each."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeError, get_handle
from mmagic_tome.evaluation import contenders as c


def test_every_kind_changes_the_model_and_leaves_it_dense():
    unet, inputs = tiny_unet(), tiny_inputs()
    sample, rest = inputs.pop("sample"), inputs

    @torch.no_grad()
    def run(contender):
        # tomesd makes its generator from the global one.
        torch.manual_seed(0)
        with contender.on(unet):
            return unet(sample, **rest).sample

    dense = run(c.Contender("dense"))
    ours = run(c.merged("ours", {"ratio": 0.5}))
    theirs = run(c.tomesd_contender("theirs", 0.5))
    assert not torch.equal(ours, dense) and not torch.equal(theirs, dense)
    assert not torch.equal(ours, theirs)
    assert torch.equal(run(c.tomesd_contender("theirs", 0.5)), theirs)
    assert torch.equal(run(c.Contender("steps", steps=3)), dense)
    assert get_handle(unet) is None


def test_deepcache_reuses_every_second_step_and_goes_off_again():
    pytest.importorskip("DeepCache")
    unet, times = tiny_unet(), torch.tensor([800, 600, 400, 200])
    model = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=times))
    rest = {k: v for k, v in tiny_inputs().items() if k not in ("sample", "timestep")}

    @torch.no_grad()
    def run(contender):
        with contender.on(model):
            outputs = []
            for step, time in enumerate(times):
                sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(step))
                outputs.append(unet(sample, time, **rest).sample)
            return torch.stack(outputs)

    dense = run(c.Contender("dense"))
    theirs = run(c.deepcache_contender("theirs", 2))
    changed = [not torch.equal(a, b) for a, b in zip(theirs, dense)]
    assert changed == [False, True, False, True]
    assert torch.equal(run(c.Contender("dense")), dense)


def test_step_caching_skips_and_goes_off_again():
    unet, inputs = tiny_unet(), tiny_inputs()
    times = [900, 700, 500, 300, 100]

    @torch.no_grad()
    def run(contender):
        with contender.on(unet) as handles:
            outputs = [unet(**{**inputs, "timestep": torch.tensor(time)}).sample for time in times]
            return outputs, [] if handles.cache is None else handles.cache.stats()

    dense, _ = run(c.Contender("dense"))
    caching = c.merged("caching", {"ratio": 0.25, "cache": {"order": 0}})
    outputs, (row,) = run(caching)
    assert row["skipped"] > 0 and row["computed"] + row["skipped"] == len(times)
    assert not torch.equal(outputs[1], dense[1])
    assert get_handle(unet) is None
    assert all(map(torch.equal, run(c.Contender("dense"))[0], dense))


def test_from_config_takes_any_tome_cfg():
    found = c.from_config(
        [
            dict(name="wide", tome_cfg=dict(ratio=0.8, sx=4, sy=4)),
            dict(name="fewer and merged", tome_cfg=dict(ratio=0.5), steps=20),
            dict(name="tomesd", tomesd=dict(ratio=0.5, use_rand=False)),
            dict(name="20 steps", steps=20),
        ]
    )
    assert [x.kind for x in found] == ["tome", "tome", "tomesd", "steps"]
    assert [x.ratio for x in found] == [0.8, 0.5, 0.5, 0]
    assert found[0].spec()["tome_cfg"]["sx"] == 4
    assert found[0].spec() != found[1].spec()


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"name": "x"}, "expected a list"),
        ([{"tome_cfg": {}}], "entry 1: write dict"),
        ([{"name": "x"}], "neither"),
        ([{"name": "x", "tome_cfg": {"ratio": 2}}], "contender 'x': ratio=2"),
        ([{"name": "x", "tome_cfg": {}, "tomesd": {}}], "both"),
        ([{"name": "x", "tome_cfg": {"ratio": lambda *_: 0.5}}], "a function or an object"),
        ([{"name": "x", "steps": 0}], "above 0"),
        ([{"name": "x", "step": 3}], "unknown keys"),
        ([{"name": "x", "tome_cfg": {"cache": "fast"}, "cache_cfg": "fast"}], "keep one"),
        ([{"name": "x", "cache_cfg": "faast"}], "'fast'"),
        ([{"name": "x", "cache_cfg": "fast", "tomesd": {}}], "both"),
        ([{"name": "x", "tome_cfg": {"cache": None}}], "neither merges nor skips"),
        ([{"name": "x", "tomesd": {"ratio": 0.9}}], "silently caps"),
        ([{"name": "x", "deepcache": {}}], "cache_interval=3"),
        ([{"name": "x", "deepcache": 0}], "cache_interval=3"),
        ([{"name": "x", "tomesd": {}}], "dict\\(ratio=0.5\\)"),
    ],
)
def test_bad_entries(entries, complaint):
    with pytest.raises(ToMeError, match=complaint):
        c.from_config(entries)


def test_fewer_steps():
    assert [x.steps for x in c.fewer_steps([0.8, 0.5, 10], 50)] == [40, 25, 10]
    # Of two steps, 0.8 is all of them.
    assert [x.steps for x in c.fewer_steps([0.8, 0.5], 2)] == [1]
    for wrong in (50, 60, 2.5, 0):
        with pytest.raises(ToMeError, match="fewer steps"):
            c.fewer_steps([wrong], 50)


def test_names():
    with pytest.raises(ToMeError, match="name of another"):
        c.check_names([c.Contender("A b"), c.Contender("a-b")])
    with pytest.raises(ToMeError, match="real pictures"):
        c.check_names([c.Contender("Real")])


def test_pictures_depend_on_what_is_not_the_default():
    """A package that learns an option goes on with pictures made before it knew it."""
    usual = c.merged("usual", {})
    assert usual.spec()["tome_cfg"] == {}
    assert usual.options()["sx"] == 2
    assert c.merged("other", {"ratio": 0.25, "sx": 2}).spec()["tome_cfg"] == {"ratio": 0.25}
    assert c.Contender("dense").options() is None
    fast = c.merged("fast", {"cache": "fast"})
    assert "tome_cfg" not in fast.spec()
    assert fast.spec()["cache_cfg"][0] == {"region": "network"}
    assert fast.options()["cache"][0]["interval"] == 2
    both = c.merged("both", {"ratio": 0.25, "cache": "fast"})
    assert both.spec()["tome_cfg"] == {"ratio": 0.25}
    assert both.spec()["cache_cfg"] == fast.spec()["cache_cfg"]
