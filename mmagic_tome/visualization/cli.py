# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/visualize.py``: its options and the checks of its input.

What it does is in ``command.py``; exit codes are those of ``apis/command_line.py``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from ..apis.command_line import (
    RATIO,
    BadInput,
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

DESCRIPTION = """\
Draw what token merging does to the pictures of a MMagic config's model: which tokens became one
at each layer and step, where the merged picture differs from the dense one, and what each layer
costs dense and merged.
"""

EPILOG = """\
Files, for each prompt NNNN_prompt:
  .png, _dense.png   the pictures
  _merge.png         merge maps: a row per block, a column per step
  _merge.gif         the same over all steps
  _error.png         dense, merged, and heat where they differ
and once cost.png (time of every site) and result.json.

example:
  python tools/visualize.py configs/demo/sd-emoji_tome-5e-1.py --prompt 'red apple' --out maps
"""


def build_parser(prog: str = "visualize") -> Parser:
    """The parser of the command."""
    parser = new_parser(prog, DESCRIPTION, EPILOG)
    add_config(parser)
    add_request(parser.add_argument_group("what to generate").add_argument)
    add = parser.add_argument_group("what to draw").add_argument
    add(
        "--ratio",
        type=RATIO,
        metavar="R",
        help="share of tokens to merge away, instead of the config's",
    )
    add(
        "--columns",
        type=number(int, low=1),
        metavar="N",
        default=4,
        help="steps on the sheet of merge maps, evenly spread over the run (default: 4)",
    )
    add(
        "--block",
        action="append",
        metavar="TEXT",
        default=[],
        help="draw only blocks with TEXT in their name, such as down_blocks.0; may be repeated",
    )
    add = parser.add_argument_group("where and how").add_argument
    add_device(add)
    add_dtype(add)
    add("--out", metavar="DIR", help="folder of the results (default: outputs/<config>_maps)")
    add("--overwrite", action="store_true", help="write over an earlier run's files in --out")
    add_cfg_options(add)
    return parser


def run(argv: list[str], prog: str) -> None:
    """Parse, check what is cheap to check, then generate and draw."""
    args = build_parser(prog).parse_args(argv)
    check_request(args)
    args.batch_size = None
    if args.ratio == 0:
        raise BadInput("--ratio 0 merges nothing: there is nothing to draw")
    check_installed("this command", {"matplotlib": "matplotlib"})
    args.folder = choose_output(
        args.out or Path("outputs") / f"{args.config_path.stem}_maps", args.overwrite
    )
    warnings.filterwarnings("ignore")
    from .command import command

    command(args, argv)


def main(argv: list[str] | None = None, prog: str = "visualize") -> int:
    """Run the command and return its exit code."""
    return exit_code(run, argv, prog)
