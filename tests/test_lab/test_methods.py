# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is compared, and that a model is the baseline again after each."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle
from mmagic_tome.lab import methods
from mmagic_tome.lab.methods import BASELINE, Method, check_names, fewer_steps, parse_method
from mmagic_tome.settings import Setting


def test_every_kind_changes_the_model_and_leaves_the_baseline():
    unet, x = tiny_unet(), tiny_inputs()
    apply_tome(unet, ratio=0.25)  # what was applied before is removed
    apply_cache(unet, "fast")

    @contextlib.contextmanager
    def louder(model):
        hook = model.register_forward_hook(lambda module, args, output: (2 * output[0],))
        yield
        hook.remove()

    @torch.no_grad()
    def run(method):
        torch.manual_seed(0)  # tomesd makes its generator from torch's global one
        with method.on(unet):
            return unet(x["sample"], x["timestep"], x["encoder_hidden_states"])[0]

    found = {}
    baseline = run(BASELINE)
    for method in (
        Method("ours", Setting.coerce({"ratio": 0.5})),
        Method("tomesd", tomesd=0.5),
        Method("function", function=louder),
    ):
        assert method.kind == method.name
        found[method.name] = run(method)
        assert torch.equal(run(method), found[method.name]), "not the same twice"
        assert torch.equal(run(BASELINE), baseline)
    assert torch.equal(found["function"], 2 * baseline)
    assert not torch.equal(found["ours"], baseline)
    assert not torch.equal(found["tomesd"], baseline)
    assert not torch.equal(found["tomesd"], found["ours"])
    assert torch.equal(run(Method("3 steps", steps=3)), baseline)
    assert get_handle(unet) is None


def test_deepcache_reuses_every_second_step_and_is_removed():
    pytest.importorskip("DeepCache")
    unet, times = tiny_unet(), torch.tensor([800, 600, 400, 200])
    model = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=times))
    text = tiny_inputs()["encoder_hidden_states"]

    @torch.no_grad()
    def run(method):
        with method.on(model):
            samples = (tiny_inputs(seed=step)["sample"] for step in range(len(times)))
            return [unet(*pair, text).sample for pair in zip(samples, times)]

    baseline = run(BASELINE)
    changed = [not torch.equal(*pair) for pair in zip(run(Method("x", deepcache=2)), baseline)]
    assert changed == [False, True, False, True]
    assert all(map(torch.equal, run(BASELINE), baseline))
    with pytest.raises(ToMeError, match="needs a scheduler"), Method("x", deepcache=2).on(unet):
        pass


def half(x):
    return 0.5


@pytest.mark.parametrize(
    ("method", "kind", "label"),
    [
        (BASELINE, "baseline", "baseline"),
        (Method.from_dict(dict(name="a", cache_cfg="fast")), "ours", "caching"),
        (Method.from_dict(dict(name="a", tome_cfg=dict(ratio=0.5, cache="fast"), steps=9)),
         "ours", "merging and caching"),
        (Method.from_dict(dict(name="a", tome_cfg={})), "ours", "merging"),
        (Method.from_dict(dict(name="a", tomesd=dict(ratio=0.5))), "tomesd", "tomesd"),
        (Method.from_dict(dict(name="a", deepcache=3)), "deepcache", "DeepCache"),
        (Method("a", steps=7), "fewer steps", "7 steps"),
        (Method("louder", function=half), "function", "louder"),
    ],
)  # fmt: skip
def test_kinds_labels_and_descriptions(method, kind, label):
    assert (method.kind, method.label) == (kind, label)
    found = method.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["name"] == method.name and found["steps"] == method.steps
    assert found != Method("another", steps=99).to_dict()


def test_descriptions_hold_what_images_depend_on():
    from importlib.metadata import version

    entry = dict(name="a", tome_cfg=dict(ratio=0.5), cache_cfg="balanced", steps=9)
    found = Method.from_dict(entry).to_dict()
    assert found["tome_cfg"]["ratio"] == 0.5 and found["tome_cfg"]["sx"] == "auto"
    assert [one["tolerance"] for one in found["cache_cfg"]] == [0.02]
    rebuilt = Method.from_dict({key: found[key] for key in entry})
    assert rebuilt.setting == Method.from_dict(entry).setting
    assert Method("a", tomesd=0.5).to_dict()["tomesd_version"] == version("tomesd")
    assert Method("a", deepcache=3).to_dict()["deepcache"] == {"cache_interval": 3}
    named = Method("a", Setting.coerce(dict(ratio=half))).to_dict()["tome_cfg"]["ratio"]
    assert named == f"{__name__}.half"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("x", "a method is a dict"),
        ({"tome_cfg": {}}, "a method is a dict"),
        ({"name": "x"}, "'x' is empty; give it one of tome_cfg"),
        ({"name": " ", "steps": 3}, "needs a name"),
        ({"name": "x", "tome_cfg": {"ratio": 2}}, "method 'x': ratio=2"),
        ({"name": "x", "tome_cfg": {}, "tomesd": 0.5}, "has setting and tomesd; write two methods"),
        ({"name": "x", "steps": 0}, "steps=0 must be an integer at least 1"),
        ({"name": "x", "step": 3}, "did you mean 'steps'"),
        ({"name": "x", "tome_cfg": {"cache": "fast"}, "cache_cfg": "fast"}, "keep one"),
        ({"name": "x", "tome_cfg": {"cache": None}}, "neither merges nor skips"),
        ({"name": "x", "tomesd": {"ratio": 0.9}}, "ratio=0.9 must be .* at most 0.75"),
        ({"name": "x", "tomesd": {}}, "ratio=None must be a number .*; write ratio=0.5"),
        ({"name": "x", "deepcache": 0}, "cache_interval=0 must be an integer at least 1"),
    ],
)
def test_wrong_entries_are_named(entry, complaint):
    with pytest.raises(ToMeError, match=complaint):
        Method.from_dict(entry)


def test_a_package_that_is_missing_is_an_error_before_anything_runs(monkeypatch):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToMeError, match=r"'x' needs tomesd, .*: pip install tomesd=="):
        parse_method("x={'tomesd': 0.5}")


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("tome:0.5", dict(name="ratio 0.5", tome_cfg=dict(ratio=0.5))),
        ("todo:0.25", dict(name="todo 0.25", tome_cfg=dict(method="todo", ratio=0.25))),
        ("cache:balanced", dict(name="balanced", cache_cfg="balanced")),
        ("tomesd:0.5", dict(name="tomesd 0.5", tomesd=0.5)),
        ("deepcache:3", dict(name="DeepCache 3", deepcache=3)),
        ("steps:13", dict(name="13 steps", steps=13)),
        ('a={"ratio": 0.6, "prop_attn": true, "cache": "fast", "steps": 20}',
         dict(name="a", tome_cfg=dict(ratio=0.6, prop_attn=True), cache_cfg="fast", steps=20)),
        ("a b = {'tome_cfg': {'ratio': 0.6}, 'sx': 4}",
         dict(name="a b", tome_cfg=dict(ratio=0.6, sx=4))),
        ("a={'tomesd': {'ratio': 0.5, 'use_rand': False}}",
         dict(name="a", tomesd=dict(ratio=0.5, use_rand=False))),
    ],
)  # fmt: skip
def test_methods_of_a_command_line(text, entry):
    assert parse_method(text) == Method.from_dict(entry)
    assert parse_method("baseline") is BASELINE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tone:0.5", "is not known; write tome:0.5"),
        ("tome", "ratio=''"),
        ("cache:faast", "method 'faast'.*'fast'"),
        ("a=3", "takes NAME="),
        ("a={'ration': 0.2}", "method 'a'.*did you mean 'ratio'"),
    ],
)
def test_wrong_methods_of_a_command_line(text, said):
    with pytest.raises(ToMeError, match=said):
        parse_method(text)


def test_fewer_steps():
    assert [one.steps for one in fewer_steps([0.8, 0.5, 10], 50)] == [40, 25, 10]
    # Of two steps, 0.8 is all of them.
    assert [one.name for one in fewer_steps([0.8, 0.5], 2)] == ["1 steps"]
    for wrong in (50, 60, 2.5, 0):
        with pytest.raises(ToMeError, match="fewer steps"):
            fewer_steps([wrong], 50)


def test_names_are_folders():
    assert Method("Ratio 0.5, new!", steps=1).slug == "ratio-0.5-new"
    check_names([Method("a", steps=1), Method("b", steps=1)])
    with pytest.raises(ToMeError, match="'A b' and 'a-b' would share the folder 'a-b'"):
        check_names([Method("A b", steps=1), Method("a-b", steps=1)])
