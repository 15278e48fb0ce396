# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/benchmark.py``: its options and the checks of its input.

What it does is in ``command.py``; exit codes are those of ``apis/command_line.py``, 2 also if
nothing could run.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

from ..apis.command_line import (
    CONFIG_SUFFIXES,
    DTYPES,
    RATIO,
    BadInput,
    Parser,
    add_cfg_options,
    add_device,
    check_cfg_options,
    check_installed,
    check_writable,
    exit_code,
    new_parser,
    number,
    parse_size,
    resolve_config,
)

DESCRIPTION = """\
Time and memory of one forward of a denoising network: dense, ours, tomesd, MMagic's own and the
ideal, side by side.

All contenders run in one process on one set of weights, in interleaved rounds, so that what slows
the machine down for a while slows all of them down. "Ideal" is what no method of this kind can
beat: the same sites get the first M of N tokens for free and are padded with zeros afterwards,
with no matching, merging or unmerging. The efficiency of a method is

    eta = (t_dense - t) / (t_dense - t_ideal)

1 = the machinery costs nothing, 0 = no faster than dense. A ratio is the median over rounds, with
an interval that holds the true one with 95 % certainty; if 1 is in it, it is marked as within
noise.
"""

EPILOG = """\
Options with several values make a case of each combination.

examples:
  python tools/benchmark.py --quick
  python tools/benchmark.py --shape sd15-level0 --rounds 9 --json figures.json --plot figures.png
  python tools/benchmark.py --target demo --size 128 256 512
  python tools/benchmark.py --target sdxl --dtype fp16 --mode eager compiled
  python tools/benchmark.py --shape small --tome wide='{"ratio": 0.8, "sx": 4, "sy": 4}'
  python tools/benchmark.py --shape small --steps 20 --tome skip='{"cache": "balanced"}'
"""

QUICK_TARGET, QUICK_ROUNDS = "small", 6


def build_parser(prog: str = "benchmark") -> Parser:
    """The parser of the command."""
    from ..meters import CLOCKS
    from .attention import ATTENTIONS
    from .kinds import CONTENDERS, MMAGIC
    from .targets import DEMO, SHAPES

    shapes = "; ".join(f"{name} = {shape.about}" for name, shape in SHAPES.items())
    parser = new_parser(prog, DESCRIPTION, EPILOG)
    add = parser.add_argument_group("what is run").add_argument
    add(
        "--target",
        "--shape",
        metavar="NAME|CONFIG",
        help=f"{DEMO} = the model that comes with the package; with random weights: {shapes}; "
        "or a MMagic config, with its weights (default: sd15)",
    )
    add(
        "--size",
        type=parse_size,
        nargs="+",
        metavar="N|HxW",
        help="height and width of the picture in pixels (default: the target's)",
    )
    whole = number(int, low=1)
    add(
        "--batch",
        type=whole,
        nargs="+",
        metavar="N",
        help="2 = one picture with classifier-free guidance (default: 2; flux 1)",
    )
    add("--dtype", choices=DTYPES, nargs="+", help="default: fp32; of a config: its own")
    add(
        "--attention",
        choices=ATTENTIONS,
        nargs="+",
        default=["default"],
        help="; ".join(f"{name} = {about}" for name, about in ATTENTIONS.items()),
    )
    add("--mode", choices=("eager", "compiled"), nargs="+", default=["eager"])
    add_cfg_options(add)

    add = parser.add_argument_group("who runs it").add_argument
    add("--contenders", nargs="+", choices=CONTENDERS, help="default: all that there are")
    add(
        "--ratio",
        type=RATIO,
        metavar="R",
        help="share of tokens that all of them remove (default: 0.5)",
    )
    add(
        "--max-downsample",
        type=lambda text: text if text == "auto" else whole(text),
        metavar="N",
        help="coarsest level to merge at (default: auto, the finest level that has blocks)",
    )
    add(
        "--r",
        type=number(int, low=0),
        metavar="N",
        help="tokens to remove per block, in vision transformers in place of --ratio (default: 8)",
    )
    add(
        "--tome",
        action="append",
        default=[],
        metavar="NAME={...}",
        help="one more of ours, under a name: options of token merging over those above, and "
        '"cache", a named step cache or a dict of its options; may be repeated',
    )

    add = parser.add_argument_group("how it is measured").add_argument
    add(
        "--steps",
        type=number(int, low=1),
        default=1,
        metavar="N",
        help="time runs of N denoising steps in place of one forward (default: 1); only they show "
        "what plan_interval, residual and step caching save",
    )
    add("--rounds", type=number(int, low=3), help="interleaved rounds (default: 7)", metavar="N")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU seconds of this process instead of wall time, for a machine that other "
        "programs use; take it with --threads 1, since threads that wait for each other count "
        "(default: wall)",
    )
    add_device(add)
    add("--threads", type=whole, metavar="N", help="CPU threads (default: torch's)")
    add("--no-memory", action="store_true", help="do not measure memory: a forward less each")
    add(
        "--quick",
        action="store_true",
        help=f"under two minutes on two cores: unless told otherwise {QUICK_TARGET}, without "
        f"{MMAGIC} (whose import takes long), as large a picture as the machine allows now, "
        f"{QUICK_ROUNDS} rounds, fewer if there is no time, one thread if the machine is busy",
    )
    add = parser.add_argument_group("results").add_argument
    add("--json", metavar="FILE", help="write every figure there")
    add("--plot", metavar="FILE", help="draw a picture there (.png, .svg, .pdf)")
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "benchmark") -> argparse.Namespace:
    """Options, with defaults filled in and checked as far as no network is needed.

    Raises:
        ToMeError: the first thing that is wrong.
    """
    from ..apis.model_config import check_device
    from ..contenders import parse_named
    from .kinds import CONTENDERS, MMAGIC, check_size
    from .targets import DEMO, SHAPES, merging_of, shape_of

    args = build_parser(prog).parse_args(argv)
    args.target = args.target or (QUICK_TARGET if args.quick else "sd15")
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else 7)
    device = check_device(args.device)
    args.device = str(device)
    if args.clock == "cpu" and device.type == "cuda":
        raise BadInput("--clock cpu says nothing about a GPU; write --clock wall")

    args.fit_size = False
    args.is_config = "::" in args.target or Path(args.target).suffix in CONFIG_SUFFIXES
    if args.is_config:
        resolve_config(args.target)
    elif args.target != DEMO:
        shape = shape_of(args.target)
        args.fit_size = args.quick and args.target == QUICK_TARGET and not args.size
        args.size = args.size or [(shape.size, shape.size)]
        for size in args.size:
            check_size(args.target, size, shape.unit)
    if args.cfg_options and not args.is_config:
        raise BadInput(f"--cfg-options needs a config as target, not {args.target}")
    check_cfg_options(args.cfg_options)
    args.size = args.size or [None]
    args.batch = args.batch or [SHAPES[args.target].batch if args.target in SHAPES else 2]
    args.dtype = args.dtype or ["config" if args.is_config else "fp32"]

    merging = merging_of(args.target)
    if args.steps > 1 and not merging.denoises:
        raise BadInput(f"--steps is for denoising networks; {args.target} has none")
    strangers = [name for name in args.contenders or () if name not in merging.contenders]
    if strangers:
        raise BadInput(
            f"--contenders: there is no {strangers[0]} for {args.target}, only "
            f"{', '.join(merging.contenders)}"
        )
    if not args.contenders:
        args.contenders = [n for n in merging.contenders if n != MMAGIC or not args.quick]
    args.everybody = merging.options(args)
    args.config = merging.config(args.everybody)
    args.own = {}
    for text in args.tome:
        name, options = parse_named(text, taken=CONTENDERS, check=merging.config)
        if name in args.own:
            raise BadInput(f"--tome {name} is there twice")
        args.own[name] = merging.own(args.everybody, options)
    for name in (args.json, args.plot):
        if name is not None:
            if Path(name).is_dir():
                raise BadInput(f"{name} is a folder, not a file")
            check_writable(Path(name).expanduser().absolute().parent)
    if args.plot is not None:
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            raise BadInput(f"--plot draws .png, .svg or .pdf, not {args.plot}")
        check_installed("--plot", {"matplotlib": "matplotlib"})
    return args


def run(argv: list[str], prog: str) -> None:
    """Parse, check what needs no network, then build, measure and report."""
    args = parse_args(argv, prog)
    # The profiler's backend reads this when torch is loaded, and is talkative without it.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    warnings.filterwarnings("ignore")
    from .command import command

    command(args, argv)


def main(argv: list[str] | None = None, prog: str = "benchmark") -> int:
    """Run the command and return its exit code."""
    return exit_code(run, argv, prog, "; nothing written")
