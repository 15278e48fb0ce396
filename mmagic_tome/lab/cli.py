# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The commands: ``python -m mmagic_tome infer|evaluate|benchmark|visualize|tune|demo|test|train``.

``tools/VERB.py`` are the same. Nothing slow is imported before the options are parsed. Exit codes:
0 done, 1 target of ``tune`` missed, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ToMeError
from . import options
from .options import MISSED, Parser, exit_code

#: Verb -> its default config or network, and what it does.
VERBS = {
    "infer": (
        "mmagic_tome::demo/sd-emoji_cache-balanced.py",
        "generate images or clips; with --compare measure against the baseline",
    ),
    "evaluate": (
        "mmagic_tome::demo/sd-emoji_cache-balanced.py",
        "compare methods on many prompts: metrics, cost, a report",
    ),
    "benchmark": ("sd15", "time and memory of one forward or some steps of a network, by methods"),
    "visualize": (
        "mmagic_tome::demo/sd-emoji_tome-5e-1.py",
        "which tokens are merged, and where images change",
    ),
    "tune": (
        "mmagic_tome::demo/sd-emoji.py",
        "the tolerance of step caching for a speed-up or a PSNR; writes a config",
    ),
    "demo": (
        "the demo model",
        "a page in the browser: the baseline beside an accelerated run",
    ),
    # Those of MMagic's runner.
    "test": ("", "MMagic's tools/test.py: the test loop of a config"),
    "train": ("", "MMagic's tools/train.py: the training of a config"),
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a verb; return its exit code.

    Args:
        argv: The verb and its options. Default: those of the process.
        prog: Name shown in help and errors. Default: ``mmagic_tome VERB``.
    """
    verb, *words = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if verb in ("-h", "--help"):
        print(f"usage: python -m mmagic_tome {'|'.join(VERBS)} [options]\n")
        print("\n".join(f"  {name:10} {about}" for name, (_, about) in VERBS.items()))
        print("\nVERB --help explains the options of each.")
        return 0
    prog = prog or f"mmagic_tome {verb}".strip()

    def run() -> int | None:
        if verb in ("test", "train"):
            from ..mmagic import entry

            return entry.run(verb, words, prog)
        if verb not in VERBS:
            wrong = f"there is no verb {verb!r}" if verb else "state a verb"
            raise ToMeError(f"{wrong}; write one of {', '.join(VERBS)}")
        args = build_parser(verb, prog).parse_args(words)
        # Before torch and the libraries of models are imported, which takes long.
        args.prompts, args.given = _prompts(args), _given(args)
        # Deprecation notes between libraries are not this command's business.
        warnings.filterwarnings("ignore")
        return _RUN[verb](args)

    return exit_code(run, prog)


def build_parser(verb: str, prog: str | None = None) -> Parser:
    """The parser of a verb. Options that are not given are None or empty."""
    default, about = VERBS[verb]
    parser = Parser(prog=prog or f"mmagic_tome {verb}", description=about, allow_abbrev=False)
    options.add_options(parser, verb, default)
    return parser


# Options that a network with random weights has no use for.
_OF_MODELS = (
    *("checkpoint", "cfg_options", "prompt", "prompt_file", "negative_prompt", "images", "masks"),
    *("controls", "references", "frames", "guidance", "seed", "extra"),
)


# --- what was asked for ---------------------------------------------------------------------------


def _source(args: argparse.Namespace) -> Any:
    """What is run; nothing is loaded."""
    from .runners import open_source

    default = args.default_config if args.pipeline is None else None
    return open_source(args.config or default, args.checkpoint, args.pipeline, args.cfg_options)


def _prompts(args: argparse.Namespace) -> list[Any]:
    """The prompts of ``--prompt`` and ``--prompt-file``; may be none."""
    from .prompts import read_prompts

    found = []
    for text in args.prompt:
        path = Path(text)
        if path.suffix in (".py", ".json", ".yaml") and ("::" in text or path.is_file()):
            raise ToMeError(f"config {text} was taken as a prompt; put it first, before --prompt")
        found += read_prompts(text[1:] if text.startswith("@") else [text])
    for name in args.prompt_file:
        found += read_prompts(name)
    return found


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a request but for the prompts; None and empty ones are not given. Files must be
    there."""
    from .request import INPUTS, Request, make_request

    given = {field.name: vars(args)[field.name] for field in fields(Request)[1:]}
    for image in itertools.chain(*(given[kind] or () for kind in INPUTS)):
        if not Path(image).expanduser().is_file():
            raise ToMeError(f"image {image} does not exist")
    path = Path(args.config or "")
    if path.suffix and "::" not in args.config and not path.expanduser().exists():
        raise ToMeError(f"config {args.config} does not exist")
    make_request(None, **{**given, **dict.fromkeys(INPUTS), "prompts": ["-"]})
    return given


def _methods(args: argparse.Namespace, setting: Any) -> list[Any]:
    """The config's setting, changed by ``--ratio`` and ``--cache``, if it does anything; then
    those of ``--method``."""
    from ..settings import Setting
    from .methods import Method, parse_method

    if args.ratio is not None:
        setting = setting.replace(ratio=args.ratio) if args.ratio else Setting(cache=setting.cache)
    if args.cache is not None:
        setting = setting.replace(cache=None if args.cache == "none" else args.cache)
    found = [] if setting.baseline else [Method(setting.description, setting)]
    return found + [parse_method(text) for text in args.method]


def _is_changed(args: argparse.Namespace) -> bool:
    return args.ratio is not None or args.cache is not None


def _method(args: argparse.Namespace, setting: Any, default: str | None) -> Any:
    """The one method that is applied: that of ``--method``, else what the config applies, else the
    default, of which a line tells."""
    from .methods import BASELINE, parse_method

    if args.method and _is_changed(args):
        raise ToMeError(
            "--ratio, --cache and --tolerance change the config's setting; write them into --method"
        )
    if len(args.method) > 1:
        raise ToMeError("only one --method can be applied; evaluate compares several")
    found = _methods(args, setting)
    if found or default is None or _is_changed(args):
        return [BASELINE, *found][-1]
    print(f"no method is stated: the baseline is compared with --method {default}")
    return parse_method(default)


def _folder(
    args: argparse.Namespace, verb: str, name: str, title: str, methods: Sequence[Any]
) -> Path | None:
    """Print what is run, on one rank; return the folder for results, or None in a dry run."""
    from mmengine.dist import get_rank

    from .results import new_folder

    _quiet()
    work_dir = Path(args.work_dir or f"work_dirs/{name}")
    folder = new_folder(work_dir, verb if args.resume else "")
    if get_rank() == 0:
        print(title)
        for one in methods:
            print(f"  {one.name}" + (f" ({one.label})" if one.label != one.name else ""))
        if args.dry_run:
            print(f"results would go to {work_dir}/<time>; nothing was run")
    return None if args.dry_run else folder


def _title(source: Any, request: Any, device: Any) -> str:
    """What is run, in one line."""
    size = "{}x{}".format(*request.size) if request.size else "the model's size"
    kind = ("clip" if source.video else "image") + ("s" if len(request) > 1 else "")
    words = [f"{len(request)} {kind}", size]
    given = {"steps": request.steps, "guidance": request.guidance, "frames": request.frames}
    words += [f"{name} {value}" for name, value in given.items() if value is not None]
    return f"{source.class_name} of {source.path} on {device}: {', '.join(words)}"


def _quiet() -> None:
    """Keep notes and progress bars of libraries out of the output."""
    for name in ("diffusers", "transformers"):
        with contextlib.suppress(ImportError):
            notes = importlib.import_module(f"{name}.utils.logging")
            notes.set_verbosity_error()
            notes.disable_progress_bar()
    with contextlib.suppress(ImportError):
        from mmengine.logging import MMLogger

        MMLogger.get_current_instance().setLevel("WARNING")


# --- verbs ----------------------------------------------------------------------------------------


def _infer(args: argparse.Namespace, maps: bool = False) -> None:
    from .devices import DTYPES, check_device
    from .infer import check, infer
    from .methods import BASELINE
    from .prompts import request_for

    source, device = _source(args), check_device(args.device)
    request, compare = request_for(source, args.prompts, args.given), maps or args.compare
    default = "tome:0.5" if maps else "cache:balanced"
    method = _method(args, source.setting, default if compare else None)
    check(source, request, method, compare, maps)
    methods = [BASELINE, method] if compare else [method]
    rounds = None if maps else args.rounds
    title = _title(source, request, device)
    folder = _folder(args, "infer", source.name, title, methods)
    if folder:
        how = {"compare": compare, "maps": maps, "rounds": rounds, "folder": folder}
        infer(source, request, method, **how, device=device, dtype=DTYPES.get(args.dtype))


def _evaluate(args: argparse.Namespace) -> None:
    from mmengine.dist import get_rank

    from .devices import check_device
    from .evaluate import evaluate
    from .methods import BASELINE
    from .plan import plan_of
    from .ranks import start_ranks

    source, device = _source(args), start_ranks(args.launcher, check_device(args.device))
    keys = ("limit", "fewer_steps", "only", "metrics", "real", "rounds", "dtype")
    given = {**args.given, **{key: vars(args)[key] for key in keys}, "prompts": args.prompts}
    # Without any of these the config's own list of methods counts.
    if args.method or _is_changed(args):
        given["methods"] = _methods(args, source.setting)
    plan = plan_of(source, **given)
    source.check(plan.request)
    title = _title(source, plan.request, device)
    folder = _folder(args, "evaluate", source.name, title, [BASELINE, *plan.methods])
    if folder:
        evaluate(source, folder=folder, device=device, **vars(plan))
    if folder and get_rank() == 0:
        _report(folder)


def _benchmark(args: argparse.Namespace) -> None:
    from ..settings import Setting
    from .benchmark import benchmark, case_request, check_methods, default_methods
    from .devices import DTYPES, check_device
    from .methods import BASELINE
    from .networks import check_network
    from .request import parse_size

    network, device = args.config or args.default_config, check_device(args.device)
    name, setting, request = network, Setting(), dict(args.given)
    size = args.size and parse_size("", args.size)
    if args.pipeline is None and not Path(network).suffix:
        check_network(network, size)
        unused = [key for key in _OF_MODELS if vars(args)[key] not in (None, [], {})]
        if unused:
            raise ToMeError(
                f"{', '.join(unused)}: no meaning for {network}, a network with random weights; "
                "leave it out, or state a config or --pipeline"
            )
    else:
        network = _source(args)
        name, setting = network.name, network.setting
        if args.prompts:
            request["prompts"] = [prompt.text for prompt in args.prompts]
        case_request(network, size, args.batch_size, args.steps, request)
    methods = _methods(args, setting) or default_methods()
    check_methods(methods)
    case = (size, args.batch_size, DTYPES.get(args.dtype), args.steps, args.rounds)
    title = f"{name} on {device}: {args.rounds} rounds"
    folder = _folder(args, "benchmark", name, title, [BASELINE, *methods])
    if folder:
        benchmark(network, methods, *case, folder, device, args.mode, request)
        _report(folder)


def _report(folder: Path) -> None:
    from .report import write_report
    from .results import RunFolder

    page = write_report(RunFolder(folder))
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"Report: {page}")


def _tune(args: argparse.Namespace) -> int | None:
    from .devices import DTYPES, check_device
    from .prompts import request_for
    from .tune import Target, check, split, tune

    if args.speedup is None and args.psnr is None:
        raise ToMeError("state what to tune for: --speedup 1.5, or --psnr 45")
    source, device = _source(args), check_device(args.device)
    request = request_for(source, args.prompts, args.given)
    target = Target("speedup", args.speedup) if args.psnr is None else Target("psnr_p5", args.psnr)
    parts = split(request, args.limit)
    check(source, request, args.cfg_options)
    title = f"{_title(source, parts['search'], device)}; tuned for {target}"
    for part, one in parts.items():
        title += f"\n  {part}: {', '.join(one.prompts)}"
    folder = _folder(args, "tune", source.name, title, ())
    if not folder:
        return None
    how = {"device": device, "dtype": DTYPES.get(args.dtype), "cfg_options": args.cfg_options}
    how.update(folder=folder, limit=args.limit, rounds=args.rounds)
    found = tune(source, request, target, **how)
    return 0 if found["met"] else MISSED


def _demo(args: argparse.Namespace) -> None:
    from .demo import Demo, demo_source
    from .demo_page import check_gradio, launch
    from .devices import DTYPES, check_device

    check_gradio()
    keys = ("config", "checkpoint", "pipeline", "cfg_options")
    source = demo_source(**{key: vars(args)[key] for key in keys})
    device = check_device(args.device)
    _quiet()
    given = {**args.given, "prompts": [prompt.text for prompt in args.prompts]}
    launch(Demo(source, device, DTYPES.get(args.dtype), **given), args.host, args.port)


_RUN = {
    "infer": _infer,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "visualize": functools.partial(_infer, maps=True),
    "tune": _tune,
    "demo": _demo,
}
