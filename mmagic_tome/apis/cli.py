# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The ``infer`` command: its options, the checks of its input, its exit codes.

MMagic is imported (about ten seconds) when these checks have passed. What the
command does is in ``infer.py``.

Exit codes: 0 done, 2 bad input (one line on stderr), 130 interrupted.
"""

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

from ..errors import ToMeError

DEFAULT_CONFIG = "mmagic_tome::demo/sd-emoji_tome-5e-1.py"
CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")
# What --compare measures and draws with: name in Python, name of the package.
COMPARE_NEEDS = {"skimage": "scikit-image", "matplotlib": "matplotlib"}
INTERRUPTED = 130
BAD_INPUT = 2

DESCRIPTION = """\
Generate images from text with the model of a MMagic config, with token merging
as its `tome_cfg` (or --ratio) says, and write them with a result.json.
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
  python tools/infer.py configs/demo/sd-emoji_tome-5e-1.py --prompt 'red apple' --compare
  python -m mmagic_tome infer mmagic_tome::demo/sd-emoji_tome-5e-1.py --ratio 0.7
"""


class BadInput(ToMeError):
    """Input that the command cannot work with."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, not the usage and a line."""

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


# --- values of options -------------------------------------------------------


def _number(kind, low=None, high=None, below=None):
    """Return an ``argparse`` type: a finite number within bounds."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {text}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"expected at most {high}, got {text}")
        if below is not None and value >= below:
            raise argparse.ArgumentTypeError(f"expected less than {below}, got {text}")
        return value

    return parse


def parse_size(text):
    """Return ``(height, width)`` in pixels from ``'256'`` or ``'256x384'``."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected N or HxW in pixels, got {text!r}")
    return int(parts[0]), int(parts[-1])


# What these options take, and what the same keys of a config's `infer_cfg` take.
VALUES = {
    "steps": _number(int, low=1),
    "guidance": _number(float, low=0),
    "size": parse_size,
    # torch takes more, but its generator on the CPU looks at 32 bits only, as numpy's does.
    "seed": _number(int, low=0, below=2**32),
    "batch_size": _number(int, low=1),
}


def check_default(key, value):
    """Return the value of a key of ``infer_cfg`` as the option of that name gives it.

    Args:
        key: A field of ``Request``.
        value: What the config says, not None. A text serves as one prompt, and
            a list of two numbers as a size.

    Raises:
        BadInput: Naming the key and what it takes.
    """
    try:
        if key == "prompts":
            prompts = [value] if isinstance(value, str) else value
            if not isinstance(prompts, (list, tuple)):
                raise ValueError(f"expected a text or a list of texts, got {value!r}")
            for prompt in prompts:
                if not isinstance(prompt, str) or not prompt.strip():
                    raise ValueError(f"expected a text for each prompt, got {prompt!r}")
            return [prompt.strip() for prompt in prompts]
        if key == "negative_prompt":
            if not isinstance(value, str):
                raise ValueError(f"expected a text, got {value!r}")
            return value
        if key == "size" and isinstance(value, (list, tuple)):
            value = "x".join(map(str, value))
        return VALUES[key](str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise BadInput(f"infer_cfg of the config: {key}: {error}") from None


def build_parser(prog="infer"):
    """Return the parser of the ``infer`` command."""
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
        help="one or more prompts, one image each; @FILE reads prompts from a file",
    )
    add(
        "--prompt-file",
        action="append",
        metavar="FILE",
        default=[],
        help="UTF-8 text, one prompt per line; empty lines and lines with # are skipped",
    )
    add("--negative-prompt", metavar="TEXT", help="what the images should not show")
    add("--steps", type=VALUES["steps"], metavar="N", help="denoising steps (default: 50)")
    add(
        "--guidance",
        type=VALUES["guidance"],
        metavar="W",
        help="classifier-free guidance weight; 1 or less is none (default: 7.5)",
    )
    add(
        "--size",
        type=VALUES["size"],
        metavar="N|HxW",
        help="height and width in pixels (default: what the model was trained at)",
    )
    add(
        "--seed",
        type=VALUES["seed"],
        metavar="N",
        help="seed of the first image; image i has seed N + i (default: 0)",
    )
    add(
        "--batch-size",
        type=VALUES["batch_size"],
        metavar="N",
        help="images per run (default: 1)",
    )

    add = parser.add_argument_group("token merging").add_argument
    add(
        "--ratio",
        type=_number(float, low=0, below=1),
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
        type=_number(int, low=1),
        metavar="N",
        help="timed rounds over all prompts (default: 1; with --compare as many as give 3 pairs)",
    )

    add = parser.add_argument_group("where and how").add_argument
    add(
        "--device",
        metavar="DEV",
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one)",
    )
    add(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="precision of the whole model (default: what the config says)",
    )
    add("--out", metavar="DIR", help="folder of the results (default: outputs/<config name>)")
    add("--overwrite", action="store_true", help="replace an earlier run's results in --out")
    add(
        "--cfg-options",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="override entries of the config, such as tome_cfg.sx=4 model.vae.from_pretrained=DIR",
    )
    return parser


# --- checks that need nothing but the standard library -----------------------


def one_line(error):
    """Return the message of an exception as one line of at most 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


def resolve_config(name):
    """Return the path of a config given as a file or as ``package::path``.

    ``package::path`` is looked up in the package's ``.mim/configs`` (where
    OpenMMLab wheels have it) and in ``configs`` beside the package (a
    checkout). The package is not imported.
    """
    if "::" not in name:
        path = Path(name).expanduser()
        if not path.is_file():
            kind = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise BadInput(f"config {name} {kind}")
        if path.suffix not in CONFIG_SUFFIXES:
            raise BadInput(f"config {name} is not a .py, .json, .yaml or .yml file")
        return path
    package, _, relative = name.partition("::")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.origin:
        raise BadInput(f"config {name}: no package {package!r} is installed")
    root = Path(spec.origin).parent
    for folder in (root / ".mim" / "configs", root.parent / "configs"):
        path = folder / relative
        if path.is_file():
            return path
    raise BadInput(f"config {name} does not exist in {package}")


def read_prompt_file(name):
    """Return the prompts in a text file, one per line."""
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"prompt file {name} is not UTF-8 text") from None
    except OSError as error:
        raise BadInput(f"cannot read prompt file {name}: {error.strerror or error}") from None
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise BadInput(f"prompt file {name} holds no prompts")
    return prompts


def gather_prompts(args):
    """Return the prompts of ``--prompt`` (with its ``@FILE``) and ``--prompt-file``."""
    prompts = []
    for text in args.prompt:
        if text.startswith("@"):
            prompts += read_prompt_file(text[1:])
        elif text.strip():
            prompts.append(text.strip())
        else:
            raise BadInput("a prompt of --prompt is empty")
    for name in args.prompt_file:
        prompts += read_prompt_file(name)
    return prompts


def check_no_config_among(prompts):
    """Fail if a prompt is a config: ``--prompt`` takes all words that follow it."""
    for text in prompts:
        path = Path(text)
        if path.suffix in CONFIG_SUFFIXES and ("::" in text or path.expanduser().is_file()):
            raise BadInput(f"config {text} was taken as a prompt; put it first, before --prompt")


def check_compare_installed():
    """Fail unless what ``--compare`` needs, and only it, is installed."""
    missing = [name for module, name in COMPARE_NEEDS.items() if not _is_installed(module)]
    if missing:
        names = " ".join(missing)
        raise BadInput(f"--compare needs what is not installed here: pip install {names}")


def _is_installed(module):
    return importlib.util.find_spec(module) is not None


def check_writable(folder):
    """Fail unless files can be made in ``folder``; leave no trace of the check."""
    folder = Path(folder)
    created = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.exists():
                path.mkdir()
                created.append(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror or error}") from None
    finally:
        for path in reversed(created):
            path.rmdir()


def choose_folder(folder, overwrite):
    """Return the folder to write to: ``folder`` or a free numbered one beside it."""
    folder = Path(folder)
    if overwrite or not holds_results(folder):
        return folder
    number = 2
    while holds_results(folder.with_name(f"{folder.name}-{number}")):
        number += 1
    return folder.with_name(f"{folder.name}-{number}")


def holds_results(folder):
    """Whether a folder has images or a result.json of an earlier run."""
    return folder.is_dir() and any(
        path.suffix == ".png" or path.name == "result.json" for path in folder.iterdir()
    )


# --- the command -------------------------------------------------------------


def run(argv, prog):
    """Parse, check what is cheap to check, then generate."""
    args = build_parser(prog).parse_args(argv)
    if args.config is None:
        check_no_config_among(args.prompt)
        args.config = DEFAULT_CONFIG
    args.config_path = resolve_config(args.config)
    args.prompts = gather_prompts(args)
    if args.compare:
        check_compare_installed()
    for option in args.cfg_options:
        if not option.partition("=")[0] or "=" not in option:
            raise BadInput(f"--cfg-options takes KEY=VALUE, got {option!r}")
    wanted = Path(args.out or Path("outputs") / args.config_path.stem).expanduser()
    check_writable(wanted)
    args.folder = choose_folder(wanted, args.overwrite)
    if args.folder != wanted:
        check_writable(args.folder)
        print(f"{wanted} holds earlier results, writing to {args.folder}")

    # Deprecation notes between libraries are not this command's business.
    warnings.filterwarnings("ignore")
    from .infer import command

    command(args, argv)


def main(argv=None, prog="infer"):
    """Run the command and return its exit code; see the top of this file.

    Args:
        argv: Arguments after the command's name; those of the process by default.
        prog: Name shown in help and complaints.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(argv, prog)
    except ToMeError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted{error}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
