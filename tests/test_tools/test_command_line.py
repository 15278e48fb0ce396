# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What all commands share: exit codes, scripts, options that mean the same everywhere."""

import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mmagic_tome import ToMeError
from mmagic_tome.__main__ import COMMANDS, main, usage
from mmagic_tome.apis.command_line import BadInput, check_cfg_options, choose_output, exit_code

ROOT = Path(__file__).resolve().parents[2]


def raising(error):
    def run(argv, prog):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadInput("no\n  such thing"), 2, "tool: error: no such thing\n"),
        (ToMeError("x" * 500), 2, f"tool: error: {'x' * 397}...\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.png"),
            2,
            "tool: error: No space left on device for a.png\n",
        ),
        (KeyboardInterrupt(), 130, "tool: interrupted; start again\n"),
        (KeyboardInterrupt("; 1 of 2 done"), 130, "tool: interrupted; 1 of 2 done\n"),
    ],
)
def test_exit_codes(error, code, said, capsys):
    assert exit_code(raising(error), [], "tool", "; start again") == code
    assert capsys.readouterr() == ("", said)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()), [], "tool")


def test_a_reader_that_is_gone_gets_no_traceback():
    code = (
        "import sys\n"
        "from mmagic_tome.apis.command_line import exit_code\n"
        "def run(argv, prog):\n"
        "    for _ in range(100_000): print(argv)\n"
        "sys.exit(exit_code(run, ['x'], 'tool'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, "")


def test_every_command_is_a_script_and_named_in_the_usage():
    scripts = {path.stem for path in (ROOT / "tools").glob("[a-z]*.py")}
    assert scripts == set(COMMANDS)
    assert all(f"  {name} " in usage() for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_scripts_run_from_a_checkout_and_can_be_interrupted(name, tmp_path):
    """The torch that the package imports stands for the seconds that the real one takes."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    # A command that is under way already may add what it leaves behind.
    assert done.stderr.startswith(f"{name}.py: interrupted") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_complain_in_one_line_under_their_name(name, capsys):
    assert main([name, "--nonsense"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith(f"mmagic_tome {name}: error: ") and "--nonsense" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name):
    parser = import_module(f"mmagic_tome.{COMMANDS[name][0]}").build_parser()
    silent = [a.option_strings for a in parser._actions if not (a.help or a.choices)]
    assert not silent


def test_cfg_options_without_a_value_are_named():
    check_cfg_options(["a.b=1", "c="])
    for wrong in ("tome_cfg.sx", "=3"):
        with pytest.raises(BadInput, match="takes KEY=VALUE, got"):
            check_cfg_options(["a=1", wrong])


def test_a_free_folder_is_chosen_and_said(tmp_path, capsys):
    wanted = tmp_path / "out"
    assert choose_output(wanted, False) == wanted and not wanted.exists()
    assert capsys.readouterr().out == ""
    for name in ("out", "out-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    assert choose_output(wanted, False) == tmp_path / "out-3"
    assert "holds earlier results, writing to" in capsys.readouterr().out
    assert choose_output(wanted, True) == wanted
