# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/visualize.py``: its options, the checks of its input, its exit codes.

Exit codes: 0 done, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

from ..apis.cli import (
    BAD_INPUT,
    DEFAULT_CONFIG,
    INTERRUPTED,
    VALUES,
    BadInput,
    Parser,
    _number,
    check_no_config_among,
    check_writable,
    choose_folder,
    gather_prompts,
    one_line,
    resolve_config,
)
from ..errors import ToMeError

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


def build_parser(prog: str = "visualize.py") -> Parser:
    """The parser of the command."""
    parser = Parser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config",
        nargs="?",
        help=f"MMagic config: a file, or package::path (default: {DEFAULT_CONFIG})",
    )
    add = parser.add_argument_group("what to generate").add_argument
    add(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        default=[],
        help="one or more prompts; @FILE reads them from a file (default: those of the config)",
    )
    add("--prompt-file", action="append", metavar="FILE", default=[], help="one prompt per line")
    add("--negative-prompt", metavar="TEXT", help="what the pictures should not show")
    add("--steps", type=VALUES["steps"], metavar="N", help="denoising steps")
    add("--guidance", type=VALUES["guidance"], metavar="W", help="classifier-free guidance weight")
    add("--size", type=VALUES["size"], metavar="N|HxW", help="height and width in pixels")
    add("--seed", type=VALUES["seed"], metavar="N", help="seed of the first picture")
    add = parser.add_argument_group("what to draw").add_argument
    add(
        "--ratio",
        type=_number(float, low=0, below=1),
        metavar="R",
        help="share of tokens to merge away, instead of the config's",
    )
    add(
        "--columns",
        type=_number(int, low=1),
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
    add("--device", metavar="DEV", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default: what the config says")
    add("--out", metavar="DIR", help="folder of the results (default: outputs/<config>_maps)")
    add("--overwrite", action="store_true", help="write over an earlier run's files in --out")
    add(
        "--cfg-options",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="override entries of the config",
    )
    return parser


def run(argv: list[str], prog: str) -> None:
    """Parse, check what is cheap to check, then generate and draw."""
    args = build_parser(prog).parse_args(argv)
    if args.config is None:
        check_no_config_among(args.prompt)
        args.config = DEFAULT_CONFIG
    args.config_path = resolve_config(args.config)
    args.prompts = gather_prompts(args)
    args.batch_size = None
    if args.ratio == 0:
        raise BadInput("--ratio 0 merges nothing: there is nothing to draw")
    for option in args.cfg_options:
        if not option.partition("=")[0] or "=" not in option:
            raise BadInput(f"--cfg-options takes KEY=VALUE, got {option!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("this needs what is not installed here: pip install matplotlib")
    wanted = Path(args.out or Path("outputs") / f"{args.config_path.stem}_maps").expanduser()
    check_writable(wanted)
    args.folder = choose_folder(wanted, args.overwrite)
    if args.folder != wanted:
        check_writable(args.folder)
        print(f"{wanted} holds earlier results, writing to {args.folder}")
    warnings.filterwarnings("ignore")
    from .command import command

    command(args, argv)


def main(argv: list[str] | None = None, prog: str = "visualize.py") -> int:
    """Run the command and return its exit code; see the top of this file."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(argv, prog)
    except ToMeError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
