# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The ``tune`` command: its options and the checks of its input.

What it does is in ``command.py``; exit codes are those of ``apis/command_line.py``.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ..apis.command_line import (
    VALUES,
    BadInput,
    Parser,
    add_cfg_options,
    add_config,
    add_device,
    add_dtype,
    check_cfg_options,
    check_installed,
    check_writable,
    exit_code,
    new_parser,
    number,
    resolve_config,
)
from ..evaluation.prompts import SETS
from .search import LEAST

NEEDS = {"matplotlib": "matplotlib", "torchmetrics": "torchmetrics"}

DESCRIPTION = """\
Find the options of token merging and reuse that reach a speed-up with the least error, or a PSNR
in the least time, for the model of a MMagic config on this machine; write them as a config.
"""

EPILOG = """\
What it does: it measures what the parts of the network cost here, tries settings on a few prompts
against the dense model's pictures, runs the best beside the dense model on prompts that the
search did not see, and writes a config, a table and a Pareto picture.

The folder --out holds everything that was done. Run the same command again after an
interruption, and it goes on where it was, to the same result; another goal begins with what
was tried already. A folder that holds another search is left alone.

Prompts: --prompts or --prompt-set, else those of the config's `evaluation` or `infer_cfg`, else
the demo model's captions. `infer_cfg` also gives steps, guidance, size, seed and batch_size.

examples:
  python tools/tune.py configs/demo/sd-emoji.py --speedup 1.5
  python tools/tune.py CONFIG --psnr 30 --prompts prompts.txt --steps 50 --budget 60
  python -m mmagic_tome tune CONFIG --speedup 2 --write configs/my_model_2x.py
"""


def build_parser(prog: str = "tune") -> Parser:
    """The parser of the command."""
    parser = new_parser(prog, DESCRIPTION, EPILOG)
    add_config(parser)
    add = parser.add_argument_group("goal (one of the two)").add_argument
    add(
        "--speedup",
        type=number(float, low=LEAST, high=100),
        metavar="X",
        help="be X times as fast as dense, whole runs, with the least error",
    )
    add(
        "--psnr",
        type=number(float, low=1, high=100),
        metavar="DB",
        help="be as fast as possible with DB dB or more against the dense pictures",
    )

    add = parser.add_argument_group("pictures").add_argument
    add("--prompts", metavar="FILE", help=".txt, .json or .csv, as the evaluate command takes it")
    add("--prompt-set", choices=SETS, help="a built-in list of prompts")
    add(
        "--search-prompts",
        type=number(int, low=1),
        default=4,
        metavar="N",
        help="so many of them to search on (default: 4)",
    )
    add(
        "--unseen-prompts",
        type=number(int, low=1),
        default=8,
        metavar="N",
        help="so many others to check the result on (default: 8)",
    )
    add("--negative-prompt", metavar="TEXT", help="what the pictures should not show")
    for name, words in (
        ("steps", "denoising steps (default: 50)"),
        ("guidance", "classifier-free guidance weight (default: 7.5)"),
        ("seed", "seed of the first picture; picture i has N + i (default: 0)"),
    ):
        add(f"--{name}", type=VALUES[name], metavar="N", help=words)
    add("--size", type=VALUES["size"], metavar="N|HxW", help="pixels (default: the model's)")
    add(
        "--batch-size",
        type=VALUES["batch_size"],
        metavar="N",
        help="pictures per run of the model, as you will use it (default: 1)",
    )

    add = parser.add_argument_group("where and how").add_argument
    add(
        "--budget",
        type=number(float, low=0.01),
        default=5.0,
        metavar="MINUTES",
        help="time for the search, without loading the model and the check at the end (default: 5)",
    )
    add("--out", metavar="DIR", help="folder (default: outputs/tune/<config name>)")
    add("--write", metavar="FILE", help="the config to write (default: OUT/<config>_<goal>.py)")
    add(
        "--overwrite",
        action="store_true",
        help="replace the config where it exists, and another search in --out",
    )
    add_device(add)
    add_dtype(add)
    add_cfg_options(add)
    return parser


def run(argv: list[str], prog: str) -> None:
    """Parse, check what needs no libraries, and do it."""
    args = build_parser(prog).parse_args(argv)
    if (args.speedup is None) == (args.psnr is None):
        found = "neither was given" if args.speedup is None else "both were given"
        raise BadInput(f"write either --speedup X or --psnr DB, {found}")
    args.config = args.config or args.default_config
    args.config_path = resolve_config(args.config)
    check_cfg_options(args.cfg_options)
    for name in ("out", "write", "prompts"):
        value = getattr(args, name)
        if value is not None and not value.strip():
            raise BadInput(f"--{name} is empty")
    if args.prompts is not None and args.prompt_set is not None:
        raise BadInput("--prompts and --prompt-set are both given; leave one of them out")
    stem = args.config_path.stem
    args.folder = Path(args.out or os.path.join("outputs", "tune", stem)).expanduser()
    goal = f"speedup-{args.speedup:g}" if args.psnr is None else f"psnr-{args.psnr:g}"
    args.target = Path(args.write or args.folder / f"{stem}_{goal}.py").expanduser()
    if args.target.suffix != ".py":
        raise BadInput(f"--write {args.target}: a config's name ends in .py")
    if args.target.exists():
        if args.target.resolve() == args.config_path.resolve():
            raise BadInput(f"--write {args.target} is the config to tune; write another name")
        if not args.overwrite:
            raise BadInput(f"{args.target} exists; write --overwrite, or --write ANOTHER.py")
    check_installed("the search", NEEDS)
    check_writable(args.folder)
    check_writable(args.target.parent)
    # Deprecation notes between libraries are not this command's business.
    warnings.filterwarnings("ignore")
    from .command import command

    command(args, argv)


def main(argv: list[str] | None = None, prog: str = "tune") -> int:
    """Run the command and return its exit code.

    Args:
        argv: arguments after the command's name; those of the process by default.
        prog: name shown in help and complaints.
    """
    return exit_code(run, argv, prog, "; run the same command again to go on")
