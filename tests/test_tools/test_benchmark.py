# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import importlib.util
import json
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_summary_of_known_times(benchmark):
    results = {
        "dense": dict(seconds=[10.0, 20.0, 40.0], mib=[5.0, 5.0, 5.0]),
        "ours": dict(seconds=[6.0, 12.0, 24.0], mib=[4.0, 4.0, 4.0]),
        "ideal": dict(seconds=[5.0, 10.0, 20.0], mib=[3.0, 3.0, 3.0]),
    }
    rows = {row["contender"]: row for row in benchmark.summarise(results)}
    # Ratios of each round, so a machine that slows down does not show.
    assert rows["ours"]["speedup"] == pytest.approx(10 / 6)
    assert rows["ours"]["eta"] == pytest.approx(0.8)
    assert rows["dense"]["eta"] == pytest.approx(0) and rows["ideal"]["eta"] == pytest.approx(1)
    assert rows["ours"]["seconds"] == 12.0 and rows["ours"]["peak_mib"] == 4.0


def test_a_spread_larger_than_the_effect_is_said(benchmark):
    results = {
        "dense": dict(seconds=[10.0, 10.0, 10.0, 10.0], mib=[1.0] * 4),
        "ours": dict(seconds=[5.0, 20.0, 6.0, 18.0], mib=[1.0] * 4),
    }
    assert "says nothing about speed" in benchmark.table(benchmark.summarise(results))
    results["ours"]["seconds"] = [5.0, 5.1, 5.0, 5.1]
    assert "says nothing" not in benchmark.table(benchmark.summarise(results))


def test_ideal_runs_the_sites_on_fewer_tokens_and_leaves_nothing_behind(benchmark):
    from tiny import tiny_inputs, tiny_unet

    unet = tiny_unet()
    args = benchmark.parse_args(["--ratio", "0.5", "--device", "cpu"])
    seen = []
    with torch.no_grad():
        dense = unet(**tiny_inputs()).sample
        with benchmark.ideal(unet, args):
            hook = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
            hook = hook.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
            assert not torch.equal(unet(**tiny_inputs()).sample, dense)
        hook.remove()
        assert seen == [128]
        assert torch.equal(unet(**tiny_inputs()).sample, dense)


def test_whole_run(benchmark, tmp_path, capsys):
    path = tmp_path / "figures.json"
    benchmark.main(
        [
            "--shape",
            "small",
            "--size",
            "64",
            "--rounds",
            "3",
            "--device",
            "cpu",
            "--json",
            str(path),
        ]
    )
    out = capsys.readouterr().out
    for name in ("dense", "ours", "tomesd", "ideal", "eta", "256 tokens"):
        assert name in out
    figures = json.loads(path.read_text())
    assert [len(r["seconds"]) for r in figures["results"].values()] == [3] * 4
    assert figures["environment"]["torch"] == torch.__version__
    # The three contenders really differ from the dense model.
    errors = {k: r["relative_rmse_to_dense"] for k, r in figures["results"].items()}
    assert errors["dense"] == 0 and all(errors[k] > 0 for k in ("ours", "tomesd", "ideal"))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("arguments", [["--rounds", "2"], ["--shape", "sd99"], ["--what"]])
def test_bad_arguments(benchmark, arguments):
    with pytest.raises(SystemExit) as error:
        benchmark.parse_args(arguments)
    assert error.value.code == 2
