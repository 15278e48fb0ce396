# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The benchmark on tiny networks."""

import numpy as np
import pytest
import torch
from tiny import tiny_unet_config
from torch import nn

from mmagic_tome import ToMeError
from mmagic_tome.lab import benchmark as module
from mmagic_tome.lab.benchmark import CASE, benchmark, default_methods, summary, table
from mmagic_tome.lab.methods import Method, parse_method
from mmagic_tome.lab.networks import NETWORKS, Work
from mmagic_tome.lab.networks.denoisers import denoiser
from mmagic_tome.lab.networks.vits import vit
from mmagic_tome.lab.results import RunFolder

OURS, TOMESD = parse_method("ours={'ratio': 0.5}"), Method("tomesd", tomesd=0.5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    unet = denoiser(tiny_unet_config(), factor=4, size=64, text=7)
    monkeypatch.setitem(NETWORKS, "tiny", unet)
    monkeypatch.setitem(NETWORKS, "tiny-vit", vit(32, 3, 2, patch=8, size=48))


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
    assert rows.loc["baseline", "speedup"] == "1.00x" and not rows.loc["baseline", "certain"]
    assert rows.loc["baseline", "relative_error"] == 0
    assert (rows.drop("baseline")["relative_error"] > 1e-3).all()
    # The peak is in the feed-forward, which only `both` makes smaller.
    peaks = rows["peak_bytes"]
    assert peaks["ideal"] == peaks["baseline"] > peaks["ideal for both"]
    assert set(rows["against tomesd"].dropna().index) == {"ours", "both"}

    folder = RunFolder(tmp_path)
    assert folder.manifest["environment"]["versions"]["torch"] == torch.__version__
    assert folder.manifest["methods"]["ours"]["tome_cfg"]["ratio"] == 0.5
    assert len(folder.find(kind="case", method="ours", size=[64, 64], batch=2)) == 5
    text = table(frame)
    assert text.startswith("64x64, batch 2, float32, eager\n") and "against tomesd" in text


def test_what_several_steps_save_is_what_is_not_computed(tmp_path, monkeypatch):
    from mmagic_tome.cache.skip import skips_of_run

    monkeypatch.setattr(module, "Clock", CountedWork)
    caching = Method.from_dict(dict(name="caching", cache_cfg={"region": "network"}))
    methods = [caching, Method("DeepCache", deepcache=2), OURS]
    frame = benchmark("tiny", methods, steps=8, rounds=1, folder=tmp_path).set_index("method")
    computed = sum("network" not in skipped for skipped in skips_of_run(caching.setting.cache, 8))
    assert computed < 8 and frame.loc["caching", "median"] == pytest.approx(8 / computed)
    assert frame.loc["DeepCache", "median"] > 1.2
    # The ideal does as many products as ours, whose search is no layer.
    assert frame.loc["ours", "median"] == frame.loc["ideal", "median"] > 1
    assert "against DeepCache" in frame and set(frame["steps"]) == {8}


def test_vision_transformers(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(module, "Clock", CountedWork)
    frame = benchmark("tiny-vit", rounds=1, folder=tmp_path)
    assert list(frame["method"]) == ["baseline", "ours", "ideal"]
    assert frame["median"][2] == pytest.approx(frame["median"][1]) and frame["median"][1] > 1.2


def test_every_combination_is_a_case(tmp_path):
    frame = benchmark(
        "tiny",
        [OURS],
        sizes=[(64, 64), (32, 64)],
        batches=[1, 2],
        dtypes=[torch.float32, torch.bfloat16],
        rounds=1,
        folder=tmp_path,
        attention="math",
        with_ideal=False,
        memory=False,
    )
    cases = frame[frame["method"] == "ours"]
    found = {(tuple(row.size), row.batch, row.dtype) for row in cases[[*CASE]].itertuples()}
    assert len(found) == len(cases) == 8 and (32, 64) in {size for size, *_ in found}
    assert frame["peak_bytes"].isna().all() and not frame["certain"].any()
    assert cases["case"].iloc[0] == "64x64, batch 1, float32, eager, math attention"


def test_written_out_attention_is_used(tmp_path):
    peaks = [
        benchmark("tiny", [], rounds=1, folder=tmp_path / name, attention=name)["peak_bytes"][0]
        for name in ("default", "math")
    ]
    # Scores of 256 x 256 tokens, 2 images, 8 heads: more than the feed-forward.
    assert peaks[1] > peaks[0]


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
    assert frame["peak_bytes"].notna().all()
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
    assert "baseline: OutOfMemoryError: CUDA out of memory" in table(frame)
    with pytest.raises(ToMeError, match="nothing could be measured: OutOfMemoryError"):
        benchmark("tiny", methods, batches=[4], rounds=1, folder=tmp_path / "other")


def test_figures_of_known_times(tmp_path):
    """A machine that slows down does not show; and by numpy."""
    slow = np.array([1, 1, 3, 1, 1.5, 1, 1])
    times = {
        "baseline": 10 * slow,
        "ours": 6 * slow * np.array([1, 1.01, 0.99, 1, 1.02, 1, 0.98]),
        "ideal": 5 * slow,
        "tomesd": 7 * slow,
    }
    case = dict(zip(CASE, ([64, 64], 2, "float32", "default", "eager", 1)))
    labels = {"ours": "merging", "tomesd": "tomesd"}
    folder = RunFolder(tmp_path)
    for name, seconds in times.items():
        row = dict.fromkeys(("peak_bytes", "peak_in", "relative_error", "ideal", "note"))
        row.update(kind="run", method=name, label=labels.get(name, name), **case)
        folder.add({**row, "ideal": "ideal" if name == "ours" else None})
        for turn, value in enumerate(seconds):
            folder.add(dict(kind="case", method=name, turn=turn, seconds=value, **case))
    row = summary(folder).set_index("method").loc["ours"]
    speedups = times["baseline"] / times["ours"]
    assert row["median"] == pytest.approx(np.median(speedups)) and row["certain"]
    assert (row["low"], row["high"]) == (speedups.min(), speedups.max())
    assert row["seconds"] == pytest.approx(np.median(times["ours"]))
    assert row["efficiency"] == "0.80 (0.78-0.82)"
    assert row["against tomesd"] == "1.17x (1.14-1.19)"


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_the_network_of_a_pipeline_is_called_as_the_pipeline_calls_it(name, tmp_path, monkeypatch):
    import tiny_folders

    from mmagic_tome.lab.runners import open_source

    monkeypatch.setattr(module, "Clock", CountedWork)
    source = open_source(pipeline=tiny_folders.pipeline_folder(name, tmp_path / "pipeline"))
    request = {"guidance": 5.0, "prompts": ["a cat"], **({"frames": 5} if source.video else {})}
    arguments = dict(sizes=[(64, 64)], rounds=1, request=request)
    methods = [OURS, Method.from_dict(dict(name="caching", cache_cfg={"region": "network"}))]
    if name == "sd":
        methods.append(parse_method("deepcache:2"))
    frame = benchmark(source, methods, steps=8, folder=tmp_path / "run", **arguments)
    frame = frame.set_index("method")
    assert frame["note"].isna().all() and frame["size"].iloc[0] == [64, 64]
    assert frame.loc["caching", "median"] > 1.3 and frame.loc["ours", "median"] > 1
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
        (dict(attention="plain"), "attention='plain' must be one of default, math"),
        (dict(mode="fast"), "mode='fast' must be one of eager, compiled"),
        (dict(clock="sun"), "no clock 'sun'"),
        (dict(network="tiny-vit", steps=2), "no denoising steps"),
        (dict(sizes=[(60, 64)]), "the nearest is 64x64"),
    ],
)
def test_wrong_requests_are_errors_before_anything_is_built(arguments, said, tmp_path):
    with pytest.raises(ToMeError, match=said):
        benchmark(**{"network": "tiny", "folder": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


def test_default_methods():
    assert [one.name for one in default_methods("sdxl")] == ["ours", "tomesd"]
    assert [one.setting.r for one in default_methods("vit-s16")] == [8]
