# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/benchmark.py``: whole runs on small networks, and its complaints."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import torch

from mmagic_tome.benchmark import cli, command, rounds, targets
from mmagic_tome.benchmark.targets import SHAPES


@pytest.fixture
def run(call_command):
    return functools.partial(call_command, cli.main)


TINY = ["--shape", "small", "--size", "64", "--rounds", "3", "--device", "cpu"]
FAST = ["--contenders", "dense", "ours", "tomesd", "ideal"]


def test_whole_run(run, tmp_path):
    path, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    own = "mlp={'targets': ['attn', 'mlp']}"
    code, out, err = run(*TINY, *FAST, "--tome", own, "--json", path, "--plot", picture)
    assert code == 0, err
    figures = json.loads(path.read_text())
    assert figures["environment"]["versions"]["torch"] == torch.__version__
    (case,) = figures["cases"]
    names = ["dense", "ours", "mlp", "tomesd", "ideal", "ideal for mlp"]
    assert list(case["results"]) == names and not case["missing"]
    assert all(f"| {name} |" in out for name in names)
    assert {len(result["seconds"]) for result in case["results"].values()} == {3}
    errors = {name: r["relative_rmse_to_dense"] for name, r in case["results"].items()}
    assert errors.pop("dense") == 0 and min(errors.values()) > 0
    assert case["results"]["ours"]["sites"][0]["kept"] == 128
    # The peak is in the feed-forward, which only `mlp` shrinks.
    peaks = {name: result["peak_bytes"] for name, result in case["results"].items()}
    assert peaks["ideal"] == peaks["dense"] > peaks["ideal for mlp"]
    assert picture.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


def test_every_combination_is_a_case(run, tmp_path):
    path = tmp_path / "figures.json"
    code, out, _ = run(
        *(*TINY, "--size", "64", "32x64", "--batch", "1", "--attention", "plain", "flash"),
        *("--contenders", "ours", "--no-memory", "--dtype", "bf16", "--json", path),
    )
    assert code == 0
    cases = json.loads(path.read_text())["cases"]
    found = [(case["case"]["size"], case["case"]["attention"]) for case in cases]
    assert found == [(s, a) for s in ([64, 64], [32, 64]) for a in ("plain", "flash")]
    assert all(case["results"]["ours"]["relative_rmse_to_dense"] > 0 for case in cases)
    assert "64x64, batch 1, bf16, plain attention, eager" in out


def test_compiled(run, monkeypatch, tmp_path):
    """What is timed and compared is what the compiler returned; tests/test_compiling.py has it."""

    class Compiled(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.calls = network, 0
            compiled.append(self)

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.network(*args, **kwargs)

    compiled = []
    monkeypatch.setattr(rounds.torch, "compile", Compiled)
    path = tmp_path / "figures.json"
    options = ["--contenders", "ours", "--mode", "compiled", "--no-memory", "--json", path]
    code, out, err = run(*TINY, *options)
    assert code == 0, err
    assert [one.calls for one in compiled] == [4, 4], "compiling, and three rounds"
    (case,) = json.loads(path.read_text())["cases"]
    assert case["case"]["mode"] == "compiled" and "compiled" in out
    assert list(case["results"]) == ["dense", "ours"]
    assert_merged(case)


def assert_merged(case):
    """Of a case of the JSON: half of the tokens are gone at all sites, and the output tells."""
    ours = case["results"]["ours"]
    assert ours["relative_rmse_to_dense"] > 1e-4
    assert ours["sites"]
    assert all(site["kept"] == site["tokens"] // 2 for site in ours["sites"])
    assert len(ours["seconds"]) == 3


def test_an_attention_that_is_not_here_is_skipped_and_said(run):
    if torch.cuda.is_available():
        pytest.skip("it is here")
    code, out, err = run(*TINY, "--attention", "efficient", "--contenders", "ours")
    assert code == 2 and "skipped: the dense network does not run with" in out
    assert "nothing could be measured" in err


def test_diffusion_transformers(run, monkeypatch):
    sd3 = dict(SHAPES["sd3"].arguments, num_layers=1, attention_head_dim=8, num_attention_heads=2)
    sd3.update(caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16)
    flux = dict(SHAPES["flux"].arguments, num_layers=1, num_single_layers=1)
    flux.update(attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6))
    flux.update(joint_attention_dim=16, pooled_projection_dim=16)
    tiny = {
        name: dataclasses.replace(SHAPES[name], arguments=arguments, size=64, text=5)
        for name, arguments in (("sd3", sd3), ("flux", flux))
    }
    monkeypatch.setattr(targets, "SHAPES", tiny)
    wide = ["--tome", "mlp={'targets': ['attn', 'mlp']}", "--tome", "block={'targets': 'block'}"]
    for name in tiny:
        code, out, err = run(
            *("--shape", name, "--rounds", "3", "--device", "cpu", "--no-memory"), *FAST, *wide
        )
        assert code == 0, err
        for row in ("dense", "ours", "mlp", "block", "ideal", "ideal for mlp", "ideal for block"):
            assert f"| {row} |" in out
        assert "tomesd does not take part: " in out


def test_demo(run, tmp_path):
    path = tmp_path / "figures.json"
    code, out, err = run(
        *("--target", "demo", "--size", "64", "--rounds", "3", "--device", "cpu", "--no-memory"),
        *("--contenders", "dense", "ours", "--json", path),
    )
    assert code == 0, err
    figures = json.loads(path.read_text())
    assert figures["target"] == "demo" and "| ours |" in out
    assert_merged(figures["cases"][0])


def test_config(run, sd_folder, tmp_path):
    pytest.importorskip("mmagic")
    from tiny import tiny_config, write_config

    model = tiny_config(folder=sd_folder)
    path = write_config(tmp_path / "config.py", model, tome_cfg=dict(ratio=0.3))
    figures = tmp_path / "figures.json"
    code, out, err = run(
        *("--target", path, "--size", "64", "--rounds", "3", "--device", "cpu", "--no-memory"),
        *("--ratio", "0.5", "--contenders", "dense", "ours", "--json", figures),
    )
    assert code == 0, err
    assert "| dense |" in out and "| ours |" in out
    (case,) = json.loads(figures.read_text())["cases"]
    # The config's own merging is not in the way: dense is dense, and ours has the ratio asked for.
    assert_merged(case)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "2"], "at least 3"),
        (["--shape", "sd99"], "no target 'sd99'"),
        (["--what"], "--what"),
        (["--target", "nowhere.py"], "does not exist"),
        (["--shape", "sd15", "--size", "100"], "multiples of 64; the nearest is 128x128"),
        (["--ratio", "0.9"], "ceiling"),
        (["--ratio", "0"], "nothing to compare"),
        (["--tome", "a={}", "--tome", "a={}"], "there twice"),
        (["--tome", "a={'ratio': 2}"], "--tome a"),
        (["--tome", "a={'cache': 'slow'}"], "--tome a: step cache: 'slow' is no named setting"),
        (["--plot", "a.txt"], "draws .png"),
        (["--json", "/dev/null/a.json"], "cannot write"),
        (["--device", "abacus"], "abacus"),
        (["--cfg-options", "a=1"], "needs a config"),
        (["--contenders", "nobody"], "nobody"),
        (["--r", "8"], "--r is for vision transformers; for sd15 write --ratio"),
    ],
)
def test_bad_input_is_one_line(run, arguments, said):
    code, out, err = run(*arguments)
    assert code == 2 and said in err and err.count("\n") == 1 and not out


def test_quick_is_a_default_that_can_be_changed():
    args = cli.parse_args(["--quick", "--device", "cpu"])
    assert (args.target, args.rounds, args.fit_size) == ("small", 6, True)
    assert "mmagic" not in args.contenders
    args = cli.parse_args(["--quick", "--shape", "sd15", "--rounds", "4", "--device", "cpu"])
    assert (args.target, args.rounds, args.fit_size) == ("sd15", 4, False)
    args = cli.parse_args(["--quick", "--size", "64", "--contenders", "mmagic", "--device", "cpu"])
    assert (args.size, args.fit_size, args.contenders) == ([(64, 64)], False, ["mmagic"])


def test_quick_takes_the_largest_picture_that_there_is_time_for(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(command, "time", clock)

    class Network:
        network = None
        forwards = 0

        def call(self, size, batch):
            assert (size, batch) == ((128, 128), 2)

            def run(network):
                self.forwards += 1
                # The first of a process is no measure.
                clock.now += 5.0 if self.forwards == 1 else 0.01

            return run

    def side(seconds):
        """With so many left after the two forwards."""
        return command._fitting_side(Network(), 2, 4, clock.now + 5.01 + seconds)

    # Five forwards of each of four, of 0.01 s at 128x128: 0.2 s, 0.6 s and 1.6 s.
    assert [side(seconds) for seconds in (0.1, 0.59, 0.61, 1.59, 1.61)] == [
        128, 128, 192, 192, 256,
    ]  # fmt: skip


def test_quick_out_of_time_does_three_rounds_and_leaves_out_the_memory(run, monkeypatch):
    monkeypatch.setattr(command, "QUICK_SECONDS", 0)
    code, out, err = run("--quick", "--contenders", "dense", "ours", "--device", "cpu")
    assert code == 0, err
    assert "### 128x128" in out and "| 3 rounds |" in out and "| - | 0 |" in out


def test_interrupted_between_cases(run, monkeypatch, tmp_path):
    run_case = rounds.run_case

    def interrupted(target, case, *rest):
        if case.batch == 2:
            raise KeyboardInterrupt
        return run_case(target, case, *rest)

    monkeypatch.setattr(command, "run_case", interrupted)
    path = tmp_path / "figures.json"
    options = [*TINY, "--contenders", "ours", "--no-memory", "--batch", "1", "2", "--json", path]
    code, _, err = run(*options)
    assert code == 130
    assert err.splitlines()[-1] == (
        f"benchmark: interrupted; the cases before this one (1) are in {path}"
    )
    (case,) = json.loads(path.read_text())["cases"]
    assert case["case"]["batch"] == 1


def test_a_run_of_several_steps_shows_what_caching_saves(run, tmp_path, monkeypatch):
    """By a clock that counts calls of layers, since a real one depends on the machine."""
    layers = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: layers.append(1) if isinstance(module, torch.nn.Linear) else None
    )

    class Count(rounds.Clock):
        def __init__(self, device, kind):
            super().__init__(device, kind)
            assert kind == "cpu"
            self.now = lambda: float(len(layers))

    monkeypatch.setattr(rounds, "Clock", Count)
    file = tmp_path / "figures.json"
    options = [*TINY, "--no-memory", "--contenders", "dense", "--steps", "6", "--clock", "cpu"]
    try:
        code, printed, err = run(*options, "--tome", "fast={'cache': 'fast'}", "--json", file)
    finally:
        hook.remove()
    assert code == 0, err
    assert "6 steps" in printed and "write --steps" not in printed
    assert "s / run (min - max)" in printed
    summary = {row["contender"]: row for row in json.loads(file.read_text())["cases"][0]["summary"]}
    assert summary["fast"]["speedup"]["median"] > 1.2
    assert summary["fast"]["eta"] is None


def test_steps_are_for_denoising_networks(run):
    code, _, err = run("--target", "vit-s16", "--steps", "8")
    assert code == 2 and "denoising" in err
