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
    check_cfg_options,
    check_installed,
    check_request,
    choose_output,
    exit_code,
    new_parser,
    number,
    resolve_config,
)

DESCRIPTION = """\
Draw what token merging does to the pictures of a MMagic config's model: which tokens became one
at each layer and step, where the merged picture differs from the dense one, and what each layer
costs dense and merged. With --input, what it does in a vision transformer: which patches of a
picture, a clip or a recording became one, block by block.
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

With --input: NNNN_<name>_tokens.png (a sheet), NNNN_<name>_tokens.gif, result.json:
  python tools/visualize.py configs/vit/vit-s14-focus_tome-r13.py --input cat.jpg --out maps
"""


# Options that a run with --input has no use for.
_GENERATING = (
    *("prompt", "prompt_file", "negative_prompt", "steps", "guidance", "size", "seed"),
    *("ratio", "block", "dtype"),
)


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
        help="steps (with --input: blocks) on the sheet of merge maps, evenly spread (default: 4)",
    )
    add(
        "--block",
        action="append",
        metavar="TEXT",
        default=[],
        help="draw only blocks with TEXT in their name, such as down_blocks.0; may be repeated",
    )
    add = parser.add_argument_group(
        "of a vision transformer (configs/vit, video, audio)"
    ).add_argument
    add(
        "--input",
        nargs="+",
        metavar="FILE",
        help="pictures; clips: GIF files or folders of frames; recordings: WAV files",
    )
    add(
        "--r",
        type=number(int, low=1),
        metavar="N",
        help="tokens that every block removes, instead of the config's",
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
    if args.input:
        _run_vit(args, argv)
        return
    if args.r is not None:
        raise BadInput("--r is for vision transformers, with --input; write --ratio")
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


def _run_vit(args, argv: list[str]) -> None:
    """``--input``: no pictures are generated."""
    if args.config is None:
        raise BadInput(
            "--input needs a config of a vision transformer, such as those of configs/vit"
        )
    for name in _GENERATING:
        if getattr(args, name) not in (None, []):
            raise BadInput(f"--{name.replace('_', '-')} has no meaning with --input")
    args.config_path = resolve_config(args.config)
    check_cfg_options(args.cfg_options)
    args.folder = choose_output(
        args.out or Path("outputs") / f"{args.config_path.stem}_maps", args.overwrite
    )
    warnings.filterwarnings("ignore")
    from .vit_command import command

    command(args, argv)


def main(argv: list[str] | None = None, prog: str = "visualize") -> int:
    """Run the command and return its exit code."""
    return exit_code(run, argv, prog)
