# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options of the commands, their values and exit codes; imports nothing slow."""

from __future__ import annotations

import argparse
import ast
import errno
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ToMeError

INTERRUPTED, BAD_INPUT = 130, 2
#: Of an option whose value may be None.
NOT_GIVEN = object()


def exit_code(run: Callable[[], object], prog: str) -> int:
    """Run a command; return 0, 2 for bad input or 130 if interrupted.

    What went wrong is one line on stderr, behind ``prog``. A bug keeps its traceback.
    """
    try:
        run()
    except SystemExit as error:  # of --help
        return int(error.code or 0)
    except ToMeError as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 400 else text[:397] + "..."
        print(f"{prog}: error: {text}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted{error}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads the output any more; Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{prog}: error: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    return 0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others are."""

    def error(self, message: str) -> None:
        """Raise :class:`ToMeError`."""
        raise ToMeError(f"{message} (see --help)")


class KeyValues(argparse.Action):
    """KEY=VALUE ..., read by mmengine's ``DictAction``, whose import takes a second.

    It makes ``'redapple'`` of ``'red apple'``, so values with spaces are read here.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Add the pairs to the dict in ``namespace``."""
        for text in values:
            if "=" not in text[1:]:
                parser.error(f"{option_string} takes KEY=VALUE, got {text!r}")
        from mmengine.config import DictAction

        action = DictAction(self.option_strings, self.dest)
        for text in values:
            key, _, value = text.partition("=")
            try:
                if " " not in value or (found := _spaced(value)) is NOT_GIVEN:
                    action(parser, namespace, [text], option_string)
                else:
                    setattr(
                        namespace, self.dest, {**(vars(namespace)[self.dest] or {}), key: found}
                    )
            except AssertionError as error:
                parser.error(f"{option_string}: {error}")


def _spaced(value: str) -> Any:
    """A value with spaces in it: what it is in Python, else a text; ``NOT_GIVEN`` of other lists,
    such as ``[a, b]``."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return NOT_GIVEN if value.startswith(("(", "[")) else value


# --- values ---------------------------------------------------------------------------------------


def number(kind: type, low: float, below: float = math.inf) -> Callable[[str], Any]:
    """An ``argparse`` type: a finite number of at least ``low`` and below ``below``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value < below:
            limit = f" and less than {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected at least {low}{limit}, got {text}")
        return value

    parse.__name__ = kind.__name__  # as argparse says what a text is not
    return parse


def parse_size(text: str) -> tuple[int, int]:
    """``(height, width)`` in pixels from ``'256'`` or ``'256x384'``."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected N or HxW in pixels, got {text!r}")
    return int(parts[0]), int(parts[-1])


def parse_tolerance(text: str) -> dict[str, float]:
    """A ``cache_cfg`` from a tolerance."""
    try:
        return {"tolerance": float(text)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write 0.01") from None


def parse_cache(text: str) -> Any:
    """A ``cache_cfg`` from a name, or a dict or list in Python's spelling; None from 'none'."""
    if text.lower() == "none":
        return None
    if not text.lstrip().startswith(("{", "[", "(")):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        wanted = "expected a name such as balanced, or a dict such as {'interval': 3}"
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}") from None


# Kinds of options.
TEXT, FILE, DIR = ({"metavar": name} for name in ("TEXT", "FILE", "DIR"))
TEXTS = {"nargs": "+", "action": "extend", "default": [], "metavar": "TEXT"}
FILES = {"nargs": "+", "metavar": "FILE"}
REPEATED = {"action": "append", "default": []}
N = {"type": number(int, 1), "metavar": "N"}
ZERO_OR_MORE = {"type": number(int, 0), "metavar": "N"}
SEED = {"type": number(int, 0, below=2**32), "metavar": "N"}  # torch's on the CPU has 32 bits
WEIGHT = {"type": number(float, 0), "metavar": "W"}
SIZE = {"type": parse_size, "metavar": "N|HxW"}
TOLERANCE = {"type": parse_tolerance, "metavar": "E", "default": NOT_GIVEN}
CACHE = {"type": parse_cache, "metavar": "NAME|DICT", "default": NOT_GIVEN}
DTYPE = {"choices": ("fp32", "fp16", "bf16")}
FLAG = {"action": "store_true"}
KEY_VALUES = {"nargs": "+", "action": KeyValues, "default": {}, "metavar": "KEY=VALUE"}


def add_options(parser: argparse.ArgumentParser, verb: str, default: str) -> None:
    """Add the options of a verb to its parser; ``default`` is what is run if nothing is stated."""
    parser.set_defaults(default_config=default)
    cases = verb == "benchmark"
    several = {"nargs": "+"} if cases else {}

    def group(title: str) -> Callable[..., None]:
        options = parser.add_argument_group(title)

        def add(names: str, kind: dict[str, Any], about: str, to: Any = options, **changes) -> None:
            to.add_argument(*names.split(), help=about, **{**kind, **changes})

        add.options = options
        return add

    add = group("what is run")
    networks = ", or small, sd15, sd15-level0, sdxl, sd3, flux (random weights)" if cases else ""
    add("config", {"nargs": "?"}, f"a file, or package::path{networks} (default: {default})")
    add("checkpoint", {"nargs": "?"}, "weights of a MMagic model (default: config's load_from)")
    add("--pipeline", DIR, "diffusers pipeline, a folder or id, not a config (default: none)")
    add("--cfg-options", KEY_VALUES, "changes of the config: tome_cfg.sx=4 ... (default: none)")

    add = group("what to generate")
    add("--prompt --text", TEXTS, "@FILE is as --prompt-file (default: the config's infer_cfg)")
    files = ".txt (a prompt per line), .json, .csv, demo, demo-held-out or imagenet"
    add("--prompt-file", {**REPEATED, **FILE}, f"{files}; may be repeated (default: none)")
    add("--negative-prompt", TEXT, "what images should not show (default: nothing)")
    each = "one for all, or one per prompt (default: none)"
    add("--img", FILES, f"image to start from or to inpaint, {each}", dest="images")
    add("--mask", FILES, f"where to inpaint (white), {each}", dest="masks")
    add("--control", FILES, f"control image of a ControlNet, {each}", dest="controls")
    add("--reference", FILES, f"image of the subject, {each}", dest="references")
    add("--frames", N, "frames of a clip (default: the model's)")
    add("--guidance", WEIGHT, "classifier-free guidance; 1 is none (default: the model's)")
    add("--seed", SEED, "of the first image; image i has seed N + i (default: 0)")
    extra = "arguments of the model's call: strength=0.5 ... (default: none)"
    add("--extra-parameters", KEY_VALUES, extra, dest="extra")

    add = group("how it is run")
    add("--device", {"metavar": "DEV"}, "cpu, cuda, cuda:1, ... (default: cuda, else cpu)")
    steps = "of one measurement (default: 1)" if cases else "(default: the model's)"
    add("--steps", N, f"denoising steps {steps}")
    add("--size", SIZE, "height and width in pixels (default: the model's)", **several)
    add("--batch-size", N, "images per call (default: 1)", **several)
    add("--dtype", DTYPE, "precision of the model (default: that of its config)", **several)

    add = group("what is applied")
    ratio = "fraction of tokens to merge; 0 merges none (default: the config's)"
    add("--ratio", WEIGHT, ratio, metavar="R")
    names = "quality, balanced, fast, a dict, or none"
    either = add.options.add_mutually_exclusive_group()
    add("--cache", CACHE, f"step caching: {names} (default: the config's)", either)
    error = "step caching: expected error of the final latent, such as 0.01 (default: the config's)"
    add("--tolerance", TOLERANCE, error, either, dest="cache")
    short = "tome:0.5, cache:balanced, tolerance:0.01, tomesd:0.5, deepcache:3, steps:13"
    long = "NAME={'ratio': 0.5, 'cache': 'balanced', 'steps': 20}"
    add("--method", {**REPEATED, **TEXT}, f"{short}, or {long} (default: what the config applies)")

    add = group("results")
    add("--work-dir", DIR, "results go to DIR/<time> (default: work_dirs/<name of the config>)")
    add("--dry-run", FLAG, "check all that needs no weights, and print it (default: run)")
    if verb in ("evaluate", "benchmark"):
        add("--resume", FLAG, "go on with the newest run in --work-dir (default: begin a new one)")
    if verb in _OF_VERB:
        _OF_VERB[verb](group(verb))


def _infer(add: Callable[..., None]) -> None:
    add("--compare", FLAG, "run the baseline too: speed-up, fidelity, a sheet (default: do not)")
    add("--rounds", N, "interleaved rounds (default: 1; with --compare for five pairs of runs)")


def _evaluate(add: Callable[..., None]) -> None:
    add("--limit", N, "so many of the prompts, evenly spread (default: all)")
    fewer = "baseline with N steps, or a share (default: 0.8 0.65 0.5)"
    add("--fewer-steps", WEIGHT, fewer, nargs="+", metavar="N")
    add("--only", TEXT, "names of methods, with * and ? (default: all)", nargs="+")
    add("--metrics", TEXT, "by name (default: those that need no download)", nargs="+")
    add("--real", DIR, "real images for FID and others (default: the baseline's images)")
    add("--rounds", ZERO_OR_MORE, "interleaved rounds that measure cost; 0: none (default: 9)")
    ranks = "torchrun --nproc-per-node N tools/evaluate.py ... --launcher pytorch"
    launchers = {"choices": ("none", "pytorch"), "default": "none"}
    add("--launcher", launchers, f"what started the processes: {ranks} (default: none)")


def _benchmark(add: Callable[..., None]) -> None:
    add("--rounds", N, "interleaved rounds (default: 7)", default=7)
    mode = {"choices": ("eager", "compiled"), "default": "eager"}
    add("--mode", mode, "compiled: torch.compile (default: eager)")
    clock = {"choices": ("wall", "cpu"), "default": "wall"}
    add("--clock", clock, "cpu: for a CPU that other programs use (default: wall)")
    add("--no-ideal", FLAG, "without the ideal of each method (default: with it)")
    add("--no-memory", FLAG, "without peak memory (default: with it)")


_OF_VERB = {
    "infer": _infer,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
}
