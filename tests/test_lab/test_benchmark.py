# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The benchmark on tiny networks."""

import pytest
import torch
from fixed_steps import skips_of_run
from tiny import tiny_unet_config
from torch import nn

from mmagic_tome import ToMeError
from mmagic_tome.lab import benchmark as module
from mmagic_tome.lab.benchmark import CASE, benchmark, default_methods
from mmagic_tome.lab.methods import Method, parse_method
from mmagic_tome.lab.networks import NETWORKS, Network, Work
from mmagic_tome.lab.results import RunFolder

OURS, TOMESD = parse_method("ours={'ratio': 0.5}"), Method("tomesd", tomesd=0.5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", Network(tiny_unet_config(), factor=4, size=64, text=7))


class CountedWork:
    """A clock whose seconds are the multiply-adds of linear layers, so that they never scatter."""

    def __init__(self, device, kind):
        self.device = torch.device(device)

    def __call__(self, function):
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
    frame = benchmark("tiny", [OURS, both, TOMESD], rounds=5, folder=tmp_path)
    rows = frame.set_index("method")
    assert list(rows.index) == ["baseline", "ours", "ideal", "both", "ideal for both", "tomesd"]
    assert set(frame["rounds"]) == {5} and frame["note"].isna().all()
    assert rows.loc["baseline", "speedup"] == 1 and not rows.loc["baseline", "certain"]
    assert rows.loc["baseline", "relative_error"] == 0
    assert (rows.drop("baseline")["relative_error"] > 1e-3).all()
    # The peak is in the feed-forward, which only `both` makes smaller.
    peaks = rows["memory"]
    assert peaks["ideal"] == peaks["baseline"] > peaks["ideal for both"]

    folder = RunFolder(tmp_path)
    assert folder.manifest["environment"]["versions"]["torch"] == torch.__version__
    assert folder.manifest["methods"]["ours"]["tome_cfg"]["ratio"] == 0.5
    assert len(folder.find(kind="case", method="ours", size=[64, 64], batch=2)) == 5


def test_what_several_steps_save_is_what_is_not_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Clock", CountedWork)
    caching = Method.from_dict(dict(name="caching", cache_cfg={"region": "network"}))
    methods = [caching, Method("DeepCache", deepcache=2), OURS]
    frame = benchmark("tiny", methods, steps=8, rounds=1, folder=tmp_path).set_index("method")
    computed = sum("network" not in skipped for skipped in skips_of_run(caching.setting.cache, 8))
    assert computed < 8 and frame.loc["caching", "speedup"] == pytest.approx(8 / computed)
    assert frame.loc["DeepCache", "speedup"] > 1.2
    # The ideal does as many products as ours, whose search is no layer.
    assert frame.loc["ours", "speedup"] == frame.loc["ideal", "speedup"] > 1
    assert set(frame["steps"]) == {8}


def test_every_combination_is_a_case(tmp_path):
    cases = dict(sizes=[(64, 64), (32, 64)], batches=[1, 2], dtypes=[torch.float32, torch.bfloat16])
    how = dict(rounds=1, folder=tmp_path, with_ideal=False, memory=False)
    frame = benchmark("tiny", [OURS], **cases, **how)
    cases = frame[frame["method"] == "ours"]
    found = {(tuple(row.size), row.batch, row.dtype) for row in cases[[*CASE]].itertuples()}
    assert len(found) == len(cases) == 8 and (32, 64) in {size for size, *_ in found}
    assert frame["memory"].isna().all() and not frame["certain"].any()
    assert cases["case"].iloc[0] == "64x64, batch 1, float32, eager"


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    ran = []

    class Killed(CountedWork):
        def __call__(self, function):
            ran.append(1)
            if len(ran) == 8:
                raise KeyboardInterrupt
            return super().__call__(function)

    monkeypatch.setattr(module, "Clock", Killed)
    arguments = dict(methods=[OURS], rounds=4, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        benchmark("tiny", **arguments)
    before = RunFolder(tmp_path).rows
    monkeypatch.setattr(module, "peak_memory", None)  # is not measured again
    frame = benchmark("tiny", **arguments)
    # Rounds 0 and 1 were whole; of round 2 one method of three.
    assert len(ran) == 8 + 6 and set(frame["rounds"]) == {4}
    assert RunFolder(tmp_path).rows[: len(before)] == before
    assert frame["memory"].notna().all()
    more = benchmark("tiny", **{**arguments, "rounds": 6})
    assert len(ran) == 14 + 6 and set(more["rounds"]) == {6}
    with pytest.raises(ToMeError, match="clock"):
        benchmark("tiny", **arguments, clock="cpu")


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
    frame = benchmark("tiny", [OURS], rounds=3, folder=tmp_path, mode="compiled", with_ideal=False)
    assert [one.calls for one in compiled] == [5, 5], "compiling, memory, and three rounds"
    assert set(frame["mode"]) == {"compiled"} and frame["relative_error"][1] > 0


def test_what_cannot_run_is_noted_and_the_others_go_on(tmp_path, monkeypatch):
    call = Work.__call__

    def out_of_memory(self, network):
        if len(self.calls[0][0][0]) == 4:
            raise torch.cuda.OutOfMemoryError("CUDA\nout  of memory")
        return call(self, network)

    monkeypatch.setattr(Work, "__call__", out_of_memory)
    methods = [parse_method("cache:balanced"), parse_method("deepcache:2"), OURS]
    frame = benchmark("tiny", methods, batches=[2, 4], rounds=1, folder=tmp_path)
    notes = frame[frame["note"].notna()].set_index(["batch", "method"])["note"]
    assert set(notes.index) == {(2, "balanced"), (2, "DeepCache 2"), (4, "baseline")}
    assert "step caching needs several steps" in notes[2, "balanced"]
    assert "needs a scheduler" in notes[2, "DeepCache 2"]
    assert notes[4, "baseline"] == "OutOfMemoryError: CUDA out of memory"
    with pytest.raises(ToMeError, match="nothing could be measured: OutOfMemoryError"):
        benchmark("tiny", methods, batches=[4], rounds=1, folder=tmp_path / "other")


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_the_network_of_a_pipeline_is_called_as_the_pipeline_calls_it(name, tmp_path, monkeypatch):
    import tiny_folders

    from mmagic_tome.lab.runners import open_source

    monkeypatch.setattr(module, "Clock", CountedWork)
    source = open_source(pipeline=tiny_folders.pipeline_folder(name, tmp_path / "pipeline"))
    request = {"guidance": 5.0, "prompts": ["a cat"], **({"frames": 5} if source.video else {})}
    arguments = dict(sizes=[(64, 64)], rounds=1, request=request)
    methods = [OURS, Method.from_dict(dict(name="caching", cache_cfg={"region": "network"}))]
    frame = benchmark(source, methods, steps=8, folder=tmp_path / "run", **arguments)
    frame = frame.set_index("method")
    assert frame["note"].isna().all() and frame["size"].iloc[0] == [64, 64]
    assert frame.loc["caching", "speedup"] > 1.3 and frame.loc["ours", "speedup"] > 1
    one = benchmark(source, [OURS], folder=tmp_path / "one", **arguments).set_index("method")
    # In each of 8 steps both guidance branches: in one forward, or in one each.
    calls = {"sd": 8, "wan": 16}[name]
    assert frame.loc["baseline", "seconds"] == calls * one.loc["baseline", "seconds"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(network="sd99"), "no network 'sd99'; write one of small, sd15"),
        (dict(methods=[Method("9 steps", steps=9)]), "'9 steps' has steps of its own"),
        (dict(methods=[OURS, OURS]), "would share the folder"),
        (dict(methods=[parse_method("Ideal={'ratio': 0.5}")]), "'Ideal' is the name of what"),
        (dict(mode="fast"), "mode='fast' must be one of eager, compiled"),
        (dict(clock="sun"), "no clock 'sun'; write one of wall, cpu"),
        (dict(clock="cpu", device="cuda"), "do not measure cuda"),
        (dict(sizes=[(64, 64), (60, 64)]), "size 60x64 .*; the nearest is 64x64"),
        (dict(network="sd15", sizes=[(512, 500)]), "size 512x500 .*; the nearest is 512x512"),
    ],
)
def test_wrong_requests_are_errors_before_anything_is_built(arguments, said, tmp_path):
    with pytest.raises(ToMeError, match=said):
        benchmark(**{"network": "tiny", "folder": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


def test_default_methods():
    assert [one.name for one in default_methods()] == ["ours", "tomesd"]
