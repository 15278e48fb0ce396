# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Options of the commands and their exit codes; imports nothing slow. What reads a value checks it:
``make_request``, ``plan_of``, the configs of the techniques."""

from __future__ import annotations

import argparse
import ast
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ToMeError, one_line

INTERRUPTED, BAD_INPUT, MISSED = 130, 2, 1


def exit_code(run: Callable[[], int | None], prog: str) -> int:
    """Run a command; return 0 or what it returns, 2 for bad input, 130 if interrupted.

    What went wrong is one line on stderr, behind ``prog``. A bug keeps its traceback.
    """
    try:
        return run() or 0
    except SystemExit as error:  # of --help
        return int(error.code or 0)
    except ToMeError as error:
        print(f"{prog}: error: {one_line(error, 400)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted{error}", file=sys.stderr)
        return INTERRUPTED


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others are."""

    def error(self, message: str) -> None:
        """Raise :class:`ToMeError`."""
        raise ToMeError(f"{message} (see --help)")


class KeyValues(argparse.Action):
    """KEY=VALUE ...: a dict, see :func:`parse_value`."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Add the pairs to the dict in ``namespace``."""
        found = dict(getattr(namespace, self.dest) or {})
        for text in values:
            key, equals, value = text.partition("=")
            if not (key and equals):
                parser.error(f"{option_string} takes KEY=VALUE, got {text!r}")
            found[key] = parse_value(value)
        setattr(namespace, self.dest, found)


def parse_value(text: str) -> Any:
    """A value in Python's spelling, or in that of mmengine (``[a, b]``, ``a,b``, ``true``), which
    is a text if it is nothing else."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    if " " in text and not text.startswith(("[", "(")):
        return text  # mmengine would remove the spaces
    from mmengine.config import DictAction

    with contextlib.suppress(AssertionError):  # brackets that are not closed
        return DictAction._parse_iterable(text)
    return text


def tolerance(text: str) -> dict[str, float]:
    """A ``cache_cfg`` of a tolerance."""
    return {"tolerance": float(text)}


_FILES = {"nargs": "+", "metavar": "FILE"}
_PAIRS = {"nargs": "+", "action": KeyValues, "default": {}, "metavar": "KEY=VALUE"}
_FLAG = {"action": "store_true"}
_REPEATED = {"action": "append", "default": []}
_N = {"type": int, "metavar": "N"}
_ROUNDS = "interleaved rounds"


def add_options(parser: argparse.ArgumentParser, verb: str, default: str) -> None:
    """Add the options of a verb to its parser; ``default`` is what is run if nothing is stated."""
    add = parser.add_argument_group("what is run").add_argument
    parser.set_defaults(default_config=default)
    shapes = ", or small, sd15, sd15-level0, sdxl, sd3, flux (random weights)"
    config = "a file, or package::path" + (shapes if verb == "benchmark" else "")
    add("config", nargs="?", help=f"{config} (default: {default})")
    add("checkpoint", nargs="?", help="weights of a MMagic model (default: config's load_from)")
    pipeline = "diffusers pipeline, a folder or id, not a config (default: none)"
    add("--pipeline", metavar="DIR", help=pipeline)
    changes = "changes of the config: tome_cfg.sx=4 ... (default: none)"
    add("--cfg-options", **_PAIRS, help=changes)
    _request(parser.add_argument_group("what to generate"))

    add = parser.add_argument_group("how it is run").add_argument
    add("--device", metavar="DEV", help="cpu, cuda, cuda:1, ... (default: cuda, else cpu)")
    steps = "of one measurement (default: 1)" if verb == "benchmark" else "(default: the model's)"
    add("--steps", **_N, help=f"denoising steps {steps}")
    size = "height and width in pixels (default: the model's)"
    add("--size", metavar="N|HxW", help=size)
    batch = "1, of a network by name 2" if verb == "benchmark" else "1"
    add("--batch-size", **_N, help=f"images per call (default: {batch})")
    dtype = "precision of the model (default: its own)"
    add("--dtype", choices=("fp32", "fp16", "bf16"), help=dtype)
    if verb in ("infer", "evaluate", "benchmark", "visualize"):
        _applied(parser.add_argument_group("what is applied"))
    if verb != "demo":
        add = parser.add_argument_group("results").add_argument
        folder = "results go to DIR/<time> (default: work_dirs/<name of the config>)"
        add("--work-dir", metavar="DIR", help=folder)
        dry_run = "check all that needs no weights, and print it (default: run)"
        add("--dry-run", **_FLAG, help=dry_run)
        resume = "go on with the newest run in --work-dir (default: begin a new one)"
        add("--resume", **_FLAG, help=resume)
    if verb in _OF_VERB:
        _OF_VERB[verb](parser.add_argument_group(verb))


def _request(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    texts = {"nargs": "+", "action": "extend", "default": [], "metavar": "TEXT"}
    prompts = "@FILE is as --prompt-file (default: the config's infer_cfg)"
    add("--prompt", "--text", **texts, help=prompts)
    files = ".txt (a prompt per line), .json, .csv, demo or demo-held-out"
    several = f"{files}; may be repeated (default: none)"
    add("--prompt-file", **_REPEATED, metavar="FILE", help=several)
    add("--negative-prompt", metavar="TEXT", help="what not to show (default: nothing)")
    each = "one for all, or one per prompt (default: none)"
    add("--img", **_FILES, dest="images", help=f"image to start from or to inpaint, {each}")
    add("--mask", **_FILES, dest="masks", help=f"where to inpaint (white), {each}")
    add("--control", **_FILES, dest="controls", help=f"control image of a ControlNet, {each}")
    add("--reference", **_FILES, dest="references", help=f"image of the subject, {each}")
    add("--frames", **_N, help="frames of a clip (default: the model's)")
    guidance = "classifier-free guidance; 1 is none (default: the model's)"
    add("--guidance", type=float, metavar="W", help=guidance)
    add("--seed", **_N, help="of the first image; image i has seed N + i (default: 0)")
    extra = "arguments of the model's call: strength=0.5 ... (default: none)"
    add("--extra-parameters", **_PAIRS, dest="extra", help=extra)


def _applied(applied: argparse._ArgumentGroup) -> None:
    ratio = "fraction of tokens to merge; 0 merges none (default: the config's)"
    applied.add_argument("--ratio", type=float, metavar="R", help=ratio)
    add = applied.add_mutually_exclusive_group().add_argument
    names = "step caching: quality, balanced, fast, a dict, or none (default: the config's)"
    add("--cache", type=parse_value, metavar="NAME|DICT", help=names)
    error = "step caching: expected error of the final latent, such as 0.01 (default: the config's)"
    add("--tolerance", dest="cache", type=tolerance, metavar="E", help=error)
    short = "tome:0.5, cache:balanced, tolerance:0.01, tomesd:0.5, deepcache:3, steps:13"
    long = "NAME={'ratio': 0.5, 'cache': 'balanced', 'steps': 20}"
    method = f"{short}, or {long} (default: what the config applies)"
    applied.add_argument("--method", **_REPEATED, metavar="TEXT", help=method)


def _infer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    compare = "run the baseline too: speed-up, fidelity, a sheet (default: do not)"
    add("--compare", **_FLAG, help=compare)
    rounds = f"{_ROUNDS} with --compare (default: five or more)"
    add("--rounds", **_N, help=rounds)


def _evaluate(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--limit", **_N, help="so many of the prompts, evenly spread (default: all)")
    fewer = "baseline with N steps, or a share (default: 0.8 0.65 0.5)"
    add("--fewer-steps", type=float, nargs="+", metavar="N", help=fewer)
    only = "names of methods, with * and ? (default: all)"
    add("--only", nargs="+", metavar="TEXT", help=only)
    metrics = "by name (default: those that need no download)"
    add("--metrics", nargs="+", metavar="TEXT", help=metrics)
    real = "real images for FID and others (default: the baseline's images)"
    add("--real", metavar="DIR", help=real)
    add("--rounds", **_N, help=f"{_ROUNDS} that measure cost; 0: none (default: 9)")
    ranks = "torchrun --nproc-per-node N tools/evaluate.py ... --launcher pytorch"
    launcher = f"what started the processes: {ranks} (default: none)"
    launchers = ("none", "pytorch", "slurm", "mpi")
    add("--launcher", choices=launchers, default="none", help=launcher)


def _benchmark(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rounds", **_N, default=7, help=f"{_ROUNDS} (default: 7)")
    mode = "compiled: torch.compile (default: eager)"
    add("--mode", choices=("eager", "compiled"), default="eager", help=mode)


def _tune(group: argparse._ArgumentGroup) -> None:
    add = group.add_mutually_exclusive_group().add_argument
    speedup = "so many times as fast as the baseline (default: none)"
    add("--speedup", type=float, metavar="X", help=speedup)
    add("--psnr", type=float, metavar="X", help="so close to the baseline, in dB (default: none)")
    limit = "images at most: half to search, half to check (default: 12)"
    group.add_argument("--limit", **_N, default=12, help=limit)
    rounds = f"{_ROUNDS} per setting (default: five or more)"
    group.add_argument("--rounds", **_N, help=rounds)


def _demo(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    host = "address to listen at; 0.0.0.0: all of this machine's (default: 127.0.0.1)"
    add("--host", metavar="ADDRESS", default="127.0.0.1", help=host)
    add("--port", **_N, help="port to listen at (default: the first free one from 7860 on)")


_OF_VERB = {
    "infer": _infer,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "tune": _tune,
    "demo": _demo,
}
