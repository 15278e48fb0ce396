# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The entrance of all commands: help, exit codes, what is found wrong before weights are loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmagic_tome import ToMeError
from mmagic_tome.__main__ import main
from mmagic_tome.assets import asset_path
from mmagic_tome.lab.cli import _RUN as VERBS
from mmagic_tome.lab.cli import build_parser
from mmagic_tome.lab.options import exit_code

pytest.importorskip("mmagic", reason="most of these models are MMagic's")
ROOT = Path(__file__).resolve().parents[2]


# --- help and exit codes --------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_tool_helps_from_anywhere_without_importing_torch(verb, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "tools" / f"{verb}.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {verb}.py")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mmagic_tome.lab.cli" in imported
    assert not imported & {"torch", "mmengine", "mmagic", "diffusers", "numpy"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option_with_its_default(verb):
    actions = [one for one in build_parser(verb)._actions if one.dest != "help"]
    assert len(actions) > 10
    assert [one.dest for one in actions if "(default: " not in (one.help or "")] == []


def test_prompt_files_are_read_before_anything_slow_is_imported(tmp_path):
    code = (
        "import sys; from mmagic_tome.__main__ import main\n"
        f"code = main(['infer', {str(tmp_path)!r}, '--prompt-file', 'missing.txt'])\n"
        "print(code, {'torch', 'mmengine', 'mmagic', 'diffusers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 set()\n" and "cannot read prompts from missing.txt" in done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("red apple", "red apple"),
        ("['red apple', 'cat']", ["red apple", "cat"]),
        ("{'a b': 1}", {"a b": 1}),
        ("[a, b]", ["a", "b"]),
        ("1,2", (1, 2)),
        ("a,b", ["a", "b"]),
    ],
)
def test_values_keep_their_spaces(text, value):
    args = build_parser("infer").parse_args(["--extra-parameters", "first=1", f"key={text}"])
    assert args.extra == {"first": 1, "key": value}


def test_verbs_are_listed_and_unknown_ones_refused(command):
    code, out, _ = command("--help")
    assert code == 0 and all(f"  {verb} " in out for verb in (*VERBS, "test", "train"))
    known = "write one of infer, evaluate, benchmark, visualize, tune, demo, test, train\n"
    for words in ((), ("paint",)):
        code, out, err = command(*words)
        assert code == 2 and not out and err.count("\n") == 1 and known in err


def test_test_and_train_go_to_mmagics_runner(monkeypatch):
    calls = []
    entry = SimpleNamespace(run=lambda *given: calls.append(given))
    monkeypatch.setitem(sys.modules, "mmagic_tome.mmagic.entry", entry)
    monkeypatch.setattr(sys.modules["mmagic_tome.mmagic"], "entry", entry, raising=False)
    assert main(["test", "a.py", "--out", "x"]) == 0 and main(["train", "b.py"], "train.py") == 0
    assert calls == [
        ("test", ["a.py", "--out", "x"], "mmagic_tome test"),
        ("train", ["b.py"], "train.py"),
    ]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ToMeError("no\n  such thing"), 2, "tool: error: no such thing\n"),
        (ToMeError("x" * 500), 2, f"tool: error: {'x' * 397}...\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
        (KeyboardInterrupt("; 1 of 2 done"), 130, "tool: interrupted; 1 of 2 done\n"),
        (SystemExit(0), 0, ""),
    ],
)
def test_exit_codes(error, code, said, capsys):
    def run():
        raise error

    assert exit_code(run, "tool") == code
    assert capsys.readouterr() == ("", said)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0, "tool")


# --- what is found wrong before anything is loaded ------------------------------------------------

WRONG = {
    "missing config": ("infer nowhere.py", "nowhere.py does not exist"),
    "broken config": ("infer {tmp}/broken.py --prompt cat", "SyntaxError"),
    "config after prompts": ("infer --prompt cat {tome}", "put it first"),
    "no prompts": ("infer {tome}", "no prompt"),
    "@file missing": ("infer {tome} --prompt @no.txt", "no.txt"),
    "image missing": ("infer {tome} --prompt cat --img no.png", "image no.png does not exist"),
    "cache is no dict": ("infer {tome} --prompt cat --cache {{interval:3}}", "no named setting"),
    "two methods": ("infer {tome} --prompt cat --method steps:3 --method steps:2", "only one"),
    "extra without value": ("infer {tome} --extra-parameters =3", "KEY=VALUE"),
    "method and ratio": ("infer {tome} --prompt cat --method steps:3 --ratio 0", "into --method"),
    "nothing to compare": ("infer {tome} --prompt cat --ratio 0 --compare", "nothing to comp"),
    "device unknown": ("infer {tome} --prompt cat --device abacus", "abacus"),
    "dtype unknown": ("infer {tome} --dtype fp8", "fp8"),
    "pipeline is none": ("infer --pipeline {tmp} --prompt cat", "model_index.json"),
    "work dir is a file": ("infer {tome} --prompt cat --work-dir {tmp}/text.txt", "cannot write"),
    "work dir of a dry run is a file": (
        "benchmark small --work-dir {tmp}/text.txt --dry-run",
        "cannot write",
    ),
    "metric unknown": (
        "evaluate {tome} --prompt cat --metrics psnr snr --dry-run",
        "did you mean 'psnr'",
    ),
    "metric of more images": (
        "evaluate {tome} --prompt cat --metrics frechet_efficientnet_lite0",
        "needs at least 50 images",
    ),
    "parts not there": (
        "evaluate {elsewhere} --prompt cat --dry-run",
        "not there: /nowhere/at/all",
    ),
    "unused checkpoint": ("benchmark small x.pth --dry-run", "checkpoint: no meaning"),
    "unused prompts": ("benchmark small --prompt-file demo --dry-run", "prompt_file: no meaning"),
    "unused seed": ("benchmark small --seed 0 --dry-run", "seed: no meaning"),
    "frames of images": ("benchmark {tome} --frames 4 --dry-run", "makes images, not clips"),
    "nothing to resume": ("evaluate {tome} --prompt a --resume --work-dir {tmp}/x", "no run in"),
    "clips are not drawn": ("visualize {clips} --prompt cat", "AnimateDiff makes clips"),
    "nothing is merged": ("visualize {tome} --prompt cat --ratio 0", "nothing to draw"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_code_2(
    case, command, configs, no_loading, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a prompt\n")
    (tmp_path / "broken.py").write_text("model = dict(\n")
    before = sorted(tmp_path.rglob("*"))
    words, expected = WRONG[case]
    code, out, err = command(*words.format(tmp=tmp_path, **configs).split())
    assert code == 2 and err.count("\n") == 1 and err.startswith("mmagic_tome ")
    assert expected in err
    assert "Traceback" not in out + err
    assert sorted(tmp_path.rglob("*")) == before, "a failed call leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "infer {tome} --prompt cat dog --size 64 --steps 3 --compare",
            ["StableDiffusion of ", ": 2 images, 64x64, steps 3\n", "  baseline\n", "(merging)"],
        ),
        (
            "infer {clips} --prompt cat --frames 4 --cache fast",
            ["AnimateDiff of ", ": 1 clip, the model's size, frames 4", "(merging and caching)"],
        ),
        ("infer --pipeline {sd3} --prompt cat", ["StableDiffusion3Pipeline of ", "work_dirs/sd3/"]),
        (
            "evaluate {evaluation}",
            ["2 images, 64x64, steps 4", "  half (merging)\n", "  2 steps\n", "/evaluation/<time>"],
        ),
        (
            "evaluate {evaluation} --limit 1 --method tomesd:0.5 --work-dir here",
            ["1 image, ", "  tomesd 0.5 (tomesd)\n", "here/<time>"],
        ),
        ("benchmark {tome} --steps 4", ["tome on cpu: 7 rounds\n", "(merging)"]),
        ("benchmark --pipeline {sd3} --method tome:0.5", ["sd3 on cpu", "(merging)"]),
        ("infer --prompt cat", ["sd-emoji_cache-balanced.py on", "(caching)"]),
    ],
)
def test_a_dry_run_says_what_would_be_run(
    words, said, command, configs, pipeline_folder, no_loading, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folders = {"sd3": pipeline_folder("sd3")}
    code, out, err = command(
        *words.format(**configs, **folders).split(), "--dry-run", "--device", "cpu"
    )
    assert code == 0, err
    for text in (*said, "nothing was run"):
        assert text in out
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_says_how_it_goes_on(command, configs, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmagic_tome.lab.evaluate.make_images", interrupt)
    words = ["evaluate", configs["evaluation"], "--device", "cpu", "--work-dir", tmp_path]
    code, _, err = command(*words)
    (folder,) = tmp_path.iterdir()
    assert code == 130 and err.endswith(f"interrupted; --resume goes on with {folder}\n")


# --- the verbs that others test, through the entrance ---------------------------------------------


def test_evaluate_reports_and_goes_on_with_a_method_more(command, configs, tmp_path):
    words = ["evaluate", configs["evaluation"], "--device", "cpu", "--work-dir", tmp_path]
    code, out, err = command(*words)
    assert code == 0, err
    (folder,) = tmp_path.iterdir()
    assert "half" in out and str(folder / "report.html") in out
    made = {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}
    assert len(made) == 3 * 2
    code, out, err = command(*words, "--method", "cache:fast", "--resume")
    assert code == 0, err
    assert list(tmp_path.iterdir()) == [folder] and "fast" in out
    assert len(list(folder.glob("images/*/*.png"))) == 4 * 2
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


def test_benchmark_prints_a_table_and_writes_a_report(command, tmp_path):
    code, out, err = command(
        *("benchmark", "small", "--size", "64", "--rounds", "3"),
        *("--method", "tome:0.5", "--device", "cpu", "--work-dir", tmp_path),
    )
    assert code == 0, err
    assert re.search(r"baseline .*\n.*ratio 0.5 ", out)
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"table.md", "results.csv", "results.json", "report.html", "rows.jsonl"} <= names


def test_assets_are_found_and_unknown_ones_named():
    assert os.path.isfile(os.path.join(asset_path("demo_model"), "model_index.json"))
    for name in ("model", "../lab", ""):
        with pytest.raises(ToMeError, match=r"there are: .*'demo_model'"):
            asset_path(name)
