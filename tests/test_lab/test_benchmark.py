# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The benchmark on tiny networks."""

import pytest
import torch
from fixed_steps import skips_of_run
from tiny import tiny_unet_config
from torch import nn

from mmagic_tome import ToMeError
from mmagic_tome.lab import benchmark as module
from mmagic_tome.lab.benchmark import benchmark, default_methods
from mmagic_tome.lab.methods import Method, parse_method
from mmagic_tome.lab.networks import NETWORKS, Network, Work
from mmagic_tome.lab.results import RunFolder
from mmagic_tome.lab.runners import open_source

OURS = parse_method("ours={'ratio': 0.5, 'targets': 'attn'}")
TOMESD = Method("tomesd", tomesd=0.5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", Network(tiny_unet_config(), factor=4, size=64, text=7))


def counted(function, device):
    """Seconds are the multiply-adds of linear layers, so that they never scatter."""
    products = []

    def count(layer, args, output):
        if isinstance(layer, nn.Linear):
            products.append(args[0].numel() * layer.out_features)

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        result = function()
    finally:
        hook.remove()
    return float(sum(products)), result


def test_all_methods_on_a_network(tmp_path):
    both = parse_method("both={'targets': ['attn', 'mlp']}")
    how = dict(size=(32, 64), batch=1, dtype=torch.bfloat16, rounds=5, folder=tmp_path)
    frame = benchmark("tiny", [OURS, both, TOMESD], **how)
    rows = frame.set_index("method")
    assert list(rows.index) == ["baseline", "ours", "both", "tomesd"]
    assert set(frame["rounds"]) == {5}
    assert rows.loc["baseline", "speedup"] == 1 and not rows.loc["baseline", "certain"]
    assert rows.loc["baseline", "relative_error"] == 0
    assert (rows.drop("baseline")["relative_error"] > 1e-3).all()
    assert (rows["memory"] > 1000).all()

    manifest = RunFolder(tmp_path).manifest
    assert manifest["environment"]["versions"]["torch"] == torch.__version__
    assert manifest["methods"]["ours"]["tome_cfg"]["ratio"] == 0.5
    assert manifest["request"] == {"steps": 1, "size": [32, 64], "batch_size": 1}
    assert (manifest["dtype"], manifest["mode"]) == ("bfloat16", "eager")


def test_what_several_steps_save_is_what_is_not_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "timed", counted)
    caching = Method.from_dict(dict(name="caching", cache_cfg={"region": "network"}))
    methods = [caching, Method("DeepCache", deepcache=2), OURS]
    frame = benchmark("tiny", methods, steps=8, rounds=1, folder=tmp_path).set_index("method")
    computed = sum("network" not in skipped for skipped in skips_of_run(caching.setting.cache, 8))
    assert computed < 8 and frame.loc["caching", "speedup"] == pytest.approx(8 / computed)
    assert frame.loc["DeepCache", "speedup"] > 1.2 and frame.loc["ours", "speedup"] > 1


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    ran = []

    def killed(*given):
        ran.append(1)
        if len(ran) == 6:
            raise KeyboardInterrupt
        return counted(*given)

    monkeypatch.setattr(module, "timed", killed)
    arguments = dict(methods=[OURS], rounds=4, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        benchmark("tiny", **arguments)
    before = RunFolder(tmp_path).rows
    frame = benchmark("tiny", **arguments)
    # Rounds 0 and 1 were whole; of round 2 one method of two.
    assert len(ran) == 6 + 4 and set(frame["rounds"]) == {4}
    assert RunFolder(tmp_path).rows[: len(before)] == before
    assert len(RunFolder(tmp_path).find(kind="memory")) == 2
    more = benchmark("tiny", **{**arguments, "rounds": 6})
    assert len(ran) == 10 + 4 and set(more["rounds"]) == {6}
    with pytest.raises(ToMeError, match="mode"):
        benchmark("tiny", **arguments, mode="compiled")


def test_compiled_networks_are_what_is_measured(tmp_path, monkeypatch):
    """tests/test_compiling.py has what the compiler makes of them."""

    class Compiled(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.calls = network, 0
            compiled.append(self)

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.network(*args, **kwargs)

    compiled = []
    monkeypatch.setattr(torch, "compile", Compiled)
    frame = benchmark("tiny", [OURS], rounds=3, folder=tmp_path, mode="compiled")
    assert [one.calls for one in compiled] == [5, 5], "compiling, memory, and three rounds"
    assert frame["relative_error"][1] > 0


def test_what_cannot_run_is_noted_and_the_others_go_on(tmp_path, monkeypatch):
    methods = [parse_method("cache:balanced"), parse_method("deepcache:2"), OURS]
    frame = benchmark("tiny", methods, rounds=1, folder=tmp_path)
    assert list(frame["method"]) == ["baseline", "ours"]
    notes = [row["text"] for row in RunFolder(tmp_path).find(kind="note")]
    assert "balanced: it changes nothing" in notes[0] and "needs several steps" in notes[0]
    assert "DeepCache 2: DeepCache needs a scheduler" in notes[1]

    def out_of_memory(self, network):
        raise torch.cuda.OutOfMemoryError("CUDA\nout  of memory")

    monkeypatch.setattr(Work, "__call__", out_of_memory)
    with pytest.raises(ToMeError, match="baseline cannot run: OutOfMemoryError: CUDA out of mem"):
        benchmark("tiny", methods, rounds=1, folder=tmp_path / "other")


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_the_network_of_a_pipeline_is_called_as_the_pipeline_calls_it(name, tmp_path, monkeypatch):
    import tiny_folders

    monkeypatch.setattr(module, "timed", counted)
    source = open_source(pipeline=tiny_folders.pipeline_folder(name, tmp_path / "pipeline"))
    request = {"guidance": 5.0, **({"frames": 5} if source.video else {})}
    arguments = dict(size=(64, 64), rounds=1, request=request)
    caching = Method.from_dict(dict(name="caching", cache_cfg={"region": "network"}))
    frame = benchmark(source, [OURS, caching], steps=8, folder=tmp_path / "run", **arguments)
    frame = frame.set_index("method")
    assert frame.loc["caching", "speedup"] > 1.3 and frame.loc["ours", "speedup"] > 1
    one = benchmark(source, [OURS], folder=tmp_path / "one", **arguments).set_index("method")
    # In each of 8 steps both guidance branches: in one forward, or in one each.
    calls = {"sd": 8, "wan": 16}[name]
    assert frame.loc["baseline", "seconds"] == calls * one.loc["baseline", "seconds"]


def test_the_network_of_a_config_is_measured_with_what_the_config_applies(configs, tmp_path):
    pytest.importorskip("mmagic")
    source = open_source(configs["tome"])
    frame = benchmark(source, None, (64, 64), 2, steps=3, rounds=1, folder=tmp_path)
    assert list(frame["method"]) == ["baseline", "ours"] and frame["relative_error"][1] > 0
    manifest = RunFolder(tmp_path).manifest
    assert manifest["model"] == "tome" and manifest["dtype"] == "float32"
    assert manifest["request"] == {"steps": 3, "size": [64, 64], "batch_size": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(network="sd99"), "no network 'sd99'; write one of small, sd15"),
        (dict(methods=[Method("9 steps", steps=9)]), "'9 steps' has steps of its own"),
        (dict(methods=[OURS, OURS]), "would share the folder"),
        (dict(mode="fast"), "mode='fast' must be one of eager, compiled"),
        (dict(size=(60, 64)), "size 60x64 .*; the nearest is 64x64"),
        (dict(network="sd15", size=(512, 500)), "size 512x500 .*; the nearest is 512x512"),
    ],
)
def test_wrong_requests_are_errors_before_anything_is_built(arguments, said, tmp_path):
    with pytest.raises(ToMeError, match=said):
        benchmark(**{"network": "tiny", "folder": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


def test_default_methods():
    assert [one.name for one in default_methods()] == ["ours", "tomesd"]
