# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The ``evaluate`` command: its options and the checks of its input.

What it does is in ``command.py``; exit codes are those of ``apis/command_line.py``.
"""

from __future__ import annotations

import argparse
import os
import warnings

from ..apis.command_line import (
    RATIO,
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
from ..cache import PRESETS
from .plan import NUMBERS
from .team import LAUNCHERS

DESCRIPTION = """\
Compare the dense model of a MMagic config with token merging and step caching in any setting
and with fewer steps: the same prompts and seeds for all, metrics, cost, a table and a report.
"""

EPILOG = """\
The folder --out holds everything that was made. Run the same command again after an
interruption, and it goes on where it was; run it with more contenders or metrics, and it makes
only what is missing. A folder that holds another evaluation is left alone.

A config may state any of these options in `evaluation`, with the same names, and there also
contenders=[dict(name=..., tome_cfg=dict(...), cache_cfg=...), dict(name=..., steps=...)].
Options of the command line win; --ratios, --methods, --cache, --tome and --tomesd stand in
place of the config's contenders.

examples:
  python tools/evaluate.py configs/demo/sd-emoji.py --prompt-set demo --limit 50
  python tools/evaluate.py CONFIG --prompts prompts.txt --ratios 0.25 0.5 --tomesd 0.5
  python tools/evaluate.py CONFIG --prompts prompts.txt --methods tome tofu pitome --ratios 0.5
  python tools/evaluate.py CONFIG --prompts p.csv --tome wide='{"ratio": 0.8, "sx": 4, "sy": 4}'
  python tools/evaluate.py CONFIG --prompts p.csv --cache balanced fast
  python tools/evaluate.py CONFIG --prompts p.csv --tome both='{"ratio": 0.5, "cache": "fast"}'
  python tools/evaluate.py configs/benchmarks/frontier_demo.py --only balanced '* steps'
  python tools/evaluate.py configs/benchmarks/tomesd_table.py --dry-run
  bash tools/dist_evaluate.sh CONFIG 8 --prompt-set imagenet
"""


def build_parser(prog: str = "evaluate") -> Parser:
    """Return the parser of the ``evaluate`` command. Options that are not given are None."""
    parser = new_parser(prog, DESCRIPTION, EPILOG)
    add_config(parser)
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--prompts",
        metavar="FILE",
        help=".txt: one per line; .json: a list of texts or of {prompt, negative_prompt, seed}; "
        ".csv: a column prompt, and optionally the other two",
    )
    add(
        "--prompt-set",
        choices=("demo", "imagenet"),
        help="the demo model's captions, or the names of the 1000 classes of ImageNet-1k",
    )
    add("--prompt-template", metavar="TEXT", help="with {} where the prompt goes")
    add(
        "--images-per-prompt",
        type=NUMBERS["images_per_prompt"],
        metavar="N",
        help="pictures of each prompt, with seeds of their own (default: 1)",
    )
    add(
        "--limit",
        type=NUMBERS["limit"],
        metavar="N",
        help="take only so many prompts, evenly spread over the list",
    )
    add("--negative-prompt", metavar="TEXT", help="for prompts that have none of their own")
    add(
        "--seed",
        type=NUMBERS["seed"],
        metavar="N",
        help="seed of the first picture; picture i has N + i (default: 0)",
    )
    add("--steps", type=NUMBERS["steps"], metavar="N", help="denoising steps (default: 50)")
    add("--guidance", type=NUMBERS["guidance"], metavar="W", help="guidance (default: 7.5)")
    add("--size", type=NUMBERS["size"], metavar="N|HxW", help="pixels (default: the model's)")
    add(
        "--batch-size",
        type=NUMBERS["batch_size"],
        metavar="N",
        help="pictures per run of the model (default: 1)",
    )

    add = parser.add_argument_group("contenders (dense is always one)").add_argument
    add("--ratios", nargs="+", type=RATIO, metavar="R", help="token merging with these ratios")
    add(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="by each of these methods, at each of --ratios (default: that of the config, else "
        "0.5); the error for a wrong name lists them",
    )
    add("--cache", nargs="+", choices=list(PRESETS), help="step caching by these named settings")
    add(
        "--tome",
        action="append",
        metavar="NAME={...}",
        help="options of tome_cfg, plus cache with a cache_cfg, under a name; may be given several "
        "times",
    )
    add("--tomesd", nargs="+", type=RATIO, metavar="R", help="the package tomesd, these ratios")
    add(
        "--fewer-steps",
        nargs="+",
        type=number(float, low=0),
        metavar="N",
        help="dense with fewer steps, as shares below 1 or numbers (default: 0.8 0.65 0.5)",
    )
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help="of all these contenders just dense and the ones with these names, such as 'cache *'",
    )
    add(
        "--dense",
        metavar="FOLDER",
        help="take the dense pictures of an earlier evaluation with the same settings",
    )

    add = parser.add_argument_group("measures").add_argument
    add(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="NAME or NAME='{\"option\": value}'; the error for a wrong name lists them",
    )
    add("--real", metavar="FOLDER", help="real pictures, for metrics such as FID")
    add(
        "--real-per-class",
        type=NUMBERS["real_per_class"],
        metavar="N",
        help="take the first N of every sub-folder of --real",
    )
    add(
        "--cost-rounds",
        type=NUMBERS["cost_rounds"],
        metavar="N",
        help="rounds of the measurement of time and memory (default: 5; those in the folder count; "
        "0: measure none now)",
    )
    add(
        "--cost-batch-size",
        type=NUMBERS["cost_batch_size"],
        metavar="N",
        help="pictures per run in that measurement, at most --batch-size (default: --batch-size)",
    )

    add = parser.add_argument_group("where and how").add_argument
    add("--out", metavar="DIR", help="folder (default: outputs/evaluate/<config name>)")
    add("--overwrite", action="store_true", help="replace another evaluation in --out")
    add("--dry-run", action="store_true", help="check everything, say what it takes, make nothing")
    add(
        "--write-table",
        metavar="FILE",
        help="also put the table into a Markdown file, between its markers",
    )
    add_device(add)
    add_dtype(add)
    add(
        "--launcher",
        choices=LAUNCHERS,
        default="none",
        help="how the processes of tools/dist_evaluate.sh find each other",
    )
    add_cfg_options(add)
    # torchrun of some versions adds it to every command.
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def run(argv, prog: str) -> None:
    """Parse, check what needs no libraries, and do it."""
    args = build_parser(prog).parse_args(argv)
    args.config = args.config or args.default_config
    args.config_path = resolve_config(args.config)
    check_cfg_options(args.cfg_options)
    for name in ("out", "dense", "real", "write_table"):
        value = getattr(args, name)
        if value is not None and not value.strip():
            raise BadInput(f"--{name.replace('_', '-')} is empty")
    args.folder = args.out or os.path.join("outputs", "evaluate", args.config_path.stem)
    check_installed("the report", {"matplotlib": "matplotlib"})
    # The check makes folders and removes them again, under the feet of other ranks.
    if args.launcher == "none" or os.environ.get("RANK") == "0":
        check_writable(args.folder)
    # Deprecation notes between libraries are not this command's business.
    warnings.filterwarnings("ignore")
    from .command import command

    command(args, argv)


def main(argv=None, prog: str = "evaluate") -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments after the command's name; those of the process by default.
        prog: Name shown in help and complaints.
    """
    return exit_code(run, argv, prog, "; run the same command again to go on")
