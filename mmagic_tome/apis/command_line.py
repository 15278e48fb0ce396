# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What all commands share: exit codes, options, the checks that need no library.

A command is a ``cli.py`` with three functions::

    def build_parser(prog):                        # new_parser, add_config, add_request, ...
    def run(argv, prog):                           # parse, check, import what is slow, do it
    def main(argv=None, prog="name"):
        return exit_code(run, argv, prog)

Bad input raises :class:`BadInput`, or any other ToMeError, with one line that says what was
found and what to write instead. Importing this module is cheap.

Exit codes: 0 done, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ToMeError

DEFAULT_CONFIG = "mmagic_tome::demo/sd-emoji_tome-5e-1.py"
# What to start with: as fast as merging promises to be, and closer to the baseline output.
BALANCED_CONFIG = "mmagic_tome::demo/sd-emoji_tome-balanced.py"
CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")
DTYPES = ("fp32", "fp16", "bf16")
INTERRUPTED = 130
BAD_INPUT = 2


class BadInput(ToMeError):
    """Input that the command cannot work with."""


def exit_code(
    run: Callable[[list[str], str], None],
    argv: list[str] | None,
    prog: str,
    interrupted: str = "",
) -> int:
    """Run a command; return its exit code, with one line on stderr where it is not 0.

    Args:
        run: the command, called with its arguments and ``prog``.
        argv: arguments after the command's name; None takes those of the process.
        prog: name shown in complaints.
        interrupted: what follows the word "interrupted", unless the interrupt itself says more,
            such as ``'; nothing written'``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(argv, prog)
    except ToMeError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted{str(error) or interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(f"{prog}: error: {error.strerror}{where}", file=sys.stderr)
        return BAD_INPUT
    return 0


def one_line(error: BaseException) -> str:
    """The message of an exception as one line of at most 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


# --- values of options ----------------------------------------------------------------------------


def number(
    kind: type, low: float | None = None, high: float | None = None, below: float | None = None
) -> Callable[[str], Any]:
    """An ``argparse`` type: a finite number within bounds.

    Args:
        kind: ``int`` or ``float``.
        low, high: smallest and largest value.
        below: bound that is itself not allowed.
    """

    def parse(text: str) -> Any:
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


def parse_size(text: str) -> tuple[int, int]:
    """``(height, width)`` in pixels from ``'256'`` or ``'256x384'``."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected N or HxW in pixels, got {text!r}")
    return int(parts[0]), int(parts[-1])


# Share of tokens to merge away; a method's own ceiling is ToMeConfig's to check.
RATIO = number(float, low=0, below=1)
# What these options take, and what the same keys of a config's `infer_cfg` take.
VALUES = {
    "steps": number(int, low=1),
    "guidance": number(float, low=0),
    "size": parse_size,
    # torch takes more, but its generator on the CPU looks at 32 bits only, as numpy's does.
    "seed": number(int, low=0, below=2**32),
    "batch_size": number(int, low=1),
}


def check_default(key: str, value: Any) -> Any:
    """The value of a key of ``infer_cfg`` as the option of that name gives it.

    Args:
        key: a field of :class:`~mmagic_tome.apis.text2image.Request`.
        value: what the config says, not None. A text serves as one prompt, and a list of two
            numbers as a size.

    Raises:
        BadInput: names the key and what it takes.
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


# --- options that several commands have -----------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, not the usage and a line."""

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def new_parser(prog: str, description: str, epilog: str) -> Parser:
    """A parser without options that shows both texts as they are laid out."""
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(parser: argparse.ArgumentParser, default: str = DEFAULT_CONFIG) -> None:
    """Add the config, the one positional argument; None if it is not given.

    Args:
        parser: of a command.
        default: what the command takes then; for :func:`check_request` in ``default_config``.
    """
    parser.add_argument(
        "config",
        nargs="?",
        help=f"MMagic config: a file, or package::path (default: {default})",
    )
    parser.set_defaults(default_config=default)


def add_request(add: Callable[..., Any]) -> None:
    """Add what to generate: prompts, steps, guidance, size and seed, as in ``Request``.

    Args:
        add: ``add_argument`` of a parser or group, here and below.
    """
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


def add_device(add: Callable[..., Any]) -> None:
    """Add ``--device``; ``apis.model_config.check_device`` turns it into a torch device."""
    add("--device", metavar="DEV", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def add_dtype(add: Callable[..., Any]) -> None:
    """Add ``--dtype``, one of :data:`DTYPES` or None."""
    add(
        "--dtype",
        choices=DTYPES,
        help="precision of the whole model (default: what the config says)",
    )


def add_cfg_options(add: Callable[..., Any]) -> None:
    """Add ``--cfg-options``, a list of KEY=VALUE; check it with :func:`check_cfg_options`."""
    add(
        "--cfg-options",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="override entries of the config, such as tome_cfg.sx=4 model.vae.from_pretrained=DIR",
    )


# --- checks that need nothing but the standard library --------------------------------------------


def check_cfg_options(options: list[str]) -> None:
    """Fail unless every value of ``--cfg-options`` is KEY=VALUE."""
    for option in options:
        if not option.partition("=")[0] or "=" not in option:
            raise BadInput(f"--cfg-options takes KEY=VALUE, got {option!r}")


def check_installed(what: str, modules: Mapping[str, str]) -> None:
    """Fail unless modules can be imported.

    Args:
        what: what needs them, the subject of the complaint.
        modules: name in Python -> name of the package to install.
    """
    missing = [name for module, name in modules.items() if not _is_installed(module)]
    if missing:
        names = " ".join(missing)
        raise BadInput(f"{what} needs what is not installed here: pip install {names}")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def resolve_config(name: str) -> Path:
    """The path of a config given as a file or as ``package::path``.

    ``package::path`` is looked up in the package's ``.mim/configs`` (where OpenMMLab wheels have
    it) and in ``configs`` beside the package (a checkout). The package is not imported.
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


def read_prompt_file(name: str) -> list[str]:
    """The prompts in a text file, one per line."""
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


def gather_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of ``--prompt`` (with its ``@FILE``) and ``--prompt-file``; may be none."""
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


def check_request(args: argparse.Namespace) -> None:
    """Check config, prompts and ``--cfg-options``; sets ``config_path`` and ``prompts``."""
    if args.config is None:
        _check_no_config_among(args.prompt)
        args.config = args.default_config
    args.config_path = resolve_config(args.config)
    args.prompts = gather_prompts(args)
    check_cfg_options(args.cfg_options)


def _check_no_config_among(prompts: list[str]) -> None:
    """Fail if a prompt is a config: ``--prompt`` takes all words that follow it."""
    for text in prompts:
        path = Path(text)
        if path.suffix in CONFIG_SUFFIXES and ("::" in text or path.expanduser().is_file()):
            raise BadInput(f"config {text} was taken as a prompt; put it first, before --prompt")


# --- where results go -----------------------------------------------------------------------------


def choose_output(wanted: str | os.PathLike, overwrite: bool) -> Path:
    """The folder to write to; says so if it is not ``wanted`` because that holds results.

    Raises:
        BadInput: nothing can be written there.
    """
    wanted = Path(wanted).expanduser()
    check_writable(wanted)
    folder = choose_folder(wanted, overwrite)
    if folder != wanted:
        check_writable(folder)
        print(f"{wanted} holds earlier results, writing to {folder}")
    return folder


def check_writable(folder: str | os.PathLike) -> None:
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


def choose_folder(folder: str | os.PathLike, overwrite: bool) -> Path:
    """``folder``, or a free numbered one beside it."""
    folder = Path(folder)
    if overwrite or not holds_results(folder):
        return folder
    count = 2
    while holds_results(folder.with_name(f"{folder.name}-{count}")):
        count += 1
    return folder.with_name(f"{folder.name}-{count}")


def holds_results(folder: Path) -> bool:
    """Whether a folder has images or a result.json of an earlier run."""
    return folder.is_dir() and any(
        path.suffix == ".png" or path.name == "result.json" for path in folder.iterdir()
    )
