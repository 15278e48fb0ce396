# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The ``infer`` command: its options and the checks of its input.

MMagic is imported (about ten seconds) when these checks have passed. What the
command does is in ``infer.py``; exit codes are those of ``command_line.py``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from ..cache import PRESETS
from .command_line import (
    BALANCED_CONFIG,
    RATIO,
    VALUES,
    Parser,
    add_cfg_options,
    add_config,
    add_device,
    add_dtype,
    add_request,
    check_installed,
    check_request,
    choose_output,
    exit_code,
    new_parser,
    number,
)

# What --compare measures and draws with: name in Python, name of the package.
COMPARE_NEEDS = {"skimage": "scikit-image", "matplotlib": "matplotlib"}

DESCRIPTION = """\
Generate images from text with the model of a MMagic config, with token merging
and step caching as its `tome_cfg` and `cache_cfg` (or --ratio and --cache) say,
and write them with a result.json.
"""

EPILOG = """\
Files: images are written to --out as they are finished, under a temporary name
first, so an interrupted run leaves whole images or none. Without --overwrite a
folder that already holds results is left alone, and a numbered one beside it
(OUT-2, OUT-3, ...) is used and named.

Each image has a seed of its own, --seed plus its number (0 comes after the
largest, 4294967295): it does not depend on the batch size, and dense and merged
images start from the same noise.

A config may state defaults for this command in `infer_cfg`, with the keys
prompts, negative_prompt, steps, guidance, size, seed and batch_size.

examples:
  python tools/infer.py configs/demo/sd-emoji_tome-balanced.py --prompt 'red apple' --compare
  python -m mmagic_tome infer mmagic_tome::demo/sd-emoji_tome-5e-1.py --ratio 0.7 --compare
"""


def build_parser(prog: str = "infer") -> Parser:
    """The parser of the command."""
    parser = new_parser(prog, DESCRIPTION, EPILOG)
    add_config(parser, BALANCED_CONFIG)
    add = parser.add_argument_group("what to generate").add_argument
    add_request(add)
    add(
        "--batch-size",
        type=VALUES["batch_size"],
        metavar="N",
        help="images per run (default: 1)",
    )

    add = parser.add_argument_group("token merging and step caching").add_argument
    add(
        "--cache",
        choices=list(PRESETS),
        help="step caching by this named setting, instead of the config's; start with balanced",
    )
    add(
        "--ratio",
        type=RATIO,
        metavar="R",
        help="share of tokens to merge away, instead of the config's; 0 merges none",
    )
    add(
        "--compare",
        action="store_true",
        help="also run the dense model; write both with their difference and times, side by side",
    )
    add(
        "--repeats",
        type=number(int, low=1),
        metavar="N",
        help="timed rounds over all prompts (default: 1; with --compare as many as give 3 pairs)",
    )

    add = parser.add_argument_group("where and how").add_argument
    add_device(add)
    add_dtype(add)
    add("--out", metavar="DIR", help="folder of the results (default: outputs/<config name>)")
    add("--overwrite", action="store_true", help="replace an earlier run's results in --out")
    add_cfg_options(add)
    return parser


def run(argv: list[str], prog: str) -> None:
    """Parse, check what is cheap to check, then generate."""
    args = build_parser(prog).parse_args(argv)
    check_request(args)
    if args.compare:
        check_installed("--compare", COMPARE_NEEDS)
    args.folder = choose_output(args.out or Path("outputs") / args.config_path.stem, args.overwrite)

    # Deprecation notes between libraries are not this command's business.
    warnings.filterwarnings("ignore")
    from .infer import command

    command(args, argv)


def main(argv: list[str] | None = None, prog: str = "infer") -> int:
    """Run the command and return its exit code.

    Args:
        argv: arguments after the command's name; those of the process by default.
        prog: name shown in help and complaints.
    """
    return exit_code(run, argv, prog)
