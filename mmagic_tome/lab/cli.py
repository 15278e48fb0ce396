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
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ToMeError
from . import options
from .options import MISSED, NOT_GIVEN, Parser, exit_code

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
# Options that a network with random weights has no use for.
_OF_MODELS = (
    *("checkpoint", "cfg_options", "prompt", "prompt_file", "negative_prompt", "images", "masks"),
    *("controls", "references", "frames", "guidance", "seed", "extra"),
)


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
    if verb in ("test", "train"):
        from ..mmagic import entry

        return getattr(entry, f"{verb}_main")(words, prog)

    def run() -> int | None:
        if verb not in VERBS:
            wrong = f"there is no verb {verb!r}" if verb else "state a verb"
            raise ToMeError(f"{wrong}; write one of {', '.join(VERBS)}")
        args = build_parser(verb, prog).parse_args(words)
        # Deprecation notes between libraries are not this command's business.
        warnings.filterwarnings("ignore")
        return _RUN[verb](args)

    return exit_code(run, prog)


def build_parser(verb: str, prog: str | None = None) -> Parser:
    """The parser of a verb. Options that are not given are None, empty or ``NOT_GIVEN``."""
    default, about = VERBS[verb]
    parser = Parser(prog=prog or f"mmagic_tome {verb}", description=about, allow_abbrev=False)
    options.add_options(parser, verb, default)
    return parser


# --- what is run ----------------------------------------------------------------------------------


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
    """Fields of a request but for the prompts; None and empty ones are not given."""
    from .request import Request

    return {field.name: vars(args)[field.name] for field in fields(Request)[1:]}


def _request(args: argparse.Namespace, source: Any) -> Any:
    from .prompts import request_for
    from .request import make_request

    given, prompts = _given(args), _prompts(args)
    return request_for(source, prompts, given) if prompts else make_request(source, **given)


def _methods(args: argparse.Namespace, setting: Any) -> list[Any]:
    """The config's setting, changed by ``--ratio`` and ``--cache``, if it does anything; then
    those of ``--method``."""
    from ..settings import Setting
    from .methods import Method, parse_method

    if args.ratio is not None:
        setting = setting.replace(ratio=args.ratio) if args.ratio else Setting(cache=setting.cache)
    if args.cache is not NOT_GIVEN:
        setting = setting.replace(cache=None if args.cache == "none" else args.cache)
    found = [] if setting.baseline else [Method(setting.description, setting)]
    return found + [parse_method(text) for text in args.method]


def _method(args: argparse.Namespace, source: Any) -> Any:
    """The one method that is applied: that of ``--method``, else what the config applies."""
    from .methods import BASELINE

    if args.method and (args.ratio is not None or args.cache is not NOT_GIVEN):
        raise ToMeError(
            "--ratio, --cache and --tolerance change the config's setting; write them into --method"
        )
    if len(args.method) > 1:
        raise ToMeError("only one --method can be applied; evaluate compares several")
    return [BASELINE, *_methods(args, source.setting)][-1]


@contextlib.contextmanager
def _results(
    args: argparse.Namespace, name: str, title: str, methods: Sequence[Any]
) -> Iterator[Path | None]:
    """Print what is run, on one rank; yield a folder for results, or None in a dry run, which tries
    whether it can be made.

    Empty folders are not left behind.
    """
    from mmengine.dist import get_rank

    from .results import new_folder

    _quiet()
    work_dir = Path(args.work_dir or f"work_dirs/{name}")
    new = [path for path in (work_dir, *work_dir.parents) if not path.exists()]
    folder = new_folder(work_dir, getattr(args, "resume", False))
    if get_rank() == 0:
        print(title)
        for one in methods:
            print(f"  {one.name}" + (f" ({one.label})" if one.label != one.name else ""))
        if args.dry_run:
            print(f"results would go to {work_dir}/<time>; nothing was run")
    try:
        yield None if args.dry_run else folder
    except KeyboardInterrupt:
        if not (hasattr(args, "resume") and (folder / "manifest.json").exists()):
            raise
        raise KeyboardInterrupt(f"; --resume goes on with {folder}") from None
    finally:
        with contextlib.suppress(OSError):
            for path in (folder, *new):
                path.rmdir()


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

    source, device = _source(args), check_device(args.device)
    request, method = _request(args, source), _method(args, source)
    compare = maps or args.compare
    if maps and method is BASELINE and args.ratio is None:  # a bare pipeline, say
        args.ratio = 0.5
        method = _method(args, source)
    check(source, request, method, compare, maps)
    methods = [BASELINE, method] if compare else [method]
    rounds = None if maps else args.rounds
    with _results(args, source.name, _title(source, request, device), methods) as folder:
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
    given = {key: vars(args)[key] for key in keys}
    given["prompts"] = _prompts(args)
    # Without any of these the config's own list of methods counts.
    if args.method or args.ratio is not None or args.cache is not NOT_GIVEN:
        given["methods"] = _methods(args, source.setting)
    plan = plan_of(source, **given, **_given(args))
    source.check(plan.request)
    title = _title(source, plan.request, device)
    with _results(args, source.name, title, [BASELINE, *plan.methods]) as folder:
        if folder:
            evaluate(source, folder=folder, device=device, **vars(plan))
        if folder and get_rank() == 0:
            _report(folder)


def _benchmark(args: argparse.Namespace) -> None:
    from ..settings import Setting
    from .benchmark import benchmark, check_methods, default_methods
    from .devices import DTYPES, check_device
    from .methods import BASELINE
    from .networks import check_network
    from .request import parse_size

    device, network = check_device(args.device), args.config or args.default_config
    sizes = [parse_size("", text) for text in args.size or ()]
    name, setting, request = network, Setting(), {}
    if args.pipeline is not None or Path(network).suffix:
        network = _source(args)
        name, setting, request = network.name, network.setting, _given(args)
        for key in ("steps", "size", "batch_size"):  # lists, of the cases
            del request[key]
        if args.prompt or args.prompt_file:
            request["prompts"] = [prompt.text for prompt in _prompts(args)]
    else:
        check_network(network, sizes)
        unused = [key for key in _OF_MODELS if vars(args)[key] not in (None, [], {})]
        if unused:
            raise ToMeError(
                f"{', '.join(unused)}: no meaning for {network}, a network with random weights; "
                "leave it out, or state a config or --pipeline"
            )
    methods = _methods(args, setting) or default_methods(setting)
    check_methods(methods)
    dtypes = [DTYPES[one] for one in args.dtype or ()]
    steps = 1 if args.steps is None else args.steps
    cases = (sizes, args.batch_size, dtypes, steps, args.rounds)
    how = {"mode": args.mode, "clock": args.clock, "request": request}
    how.update(with_ideal=not args.no_ideal, memory=not args.no_memory)
    title = f"{name} on {device}: {args.rounds} rounds"
    with _results(args, name, title, [BASELINE, *methods]) as folder:
        if folder:
            benchmark(network, methods, *cases, folder, device, **how)
            _report(folder)


def _report(folder: Path) -> None:
    from .report import write_report
    from .results import RunFolder

    page = write_report(RunFolder(folder))
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"Report: {page}")


def _tune(args: argparse.Namespace) -> int | None:
    from .devices import DTYPES, check_device
    from .tune import Target, check, split, tune

    if args.speedup is None and args.psnr is None:
        raise ToMeError("state what to tune for: --speedup 1.5, or --psnr 45")
    source, device = _source(args), check_device(args.device)
    request, key = _request(args, source), "speedup" if args.psnr is None else "psnr"
    target = Target(key, vars(args)[key])
    check(source, request, args.cfg_options)
    parts = split(request, args.limit)
    title = f"{_title(source, parts['search'], device)}; tuned for {target}"
    for part, one in parts.items():
        title += f"\n  {part}: {', '.join(one.prompts)}"
    with _results(args, source.name, title, ()) as folder:
        if not folder:
            return None
        how = {"folder": folder, "device": device, "dtype": DTYPES.get(args.dtype)}
        how.update(ratios=args.ratios, cfg_options=args.cfg_options)
        found = tune(source, request, target, limit=args.limit, rounds=args.rounds, **how)
    return 0 if found["met"] else MISSED


def _demo(args: argparse.Namespace) -> None:
    from .demo import Demo, demo_source
    from .demo_page import check_gradio, launch
    from .devices import DTYPES, check_device

    check_gradio()
    source = demo_source(args.config, args.checkpoint, args.pipeline, args.cfg_options)
    device, prompts = check_device(args.device), _prompts(args)
    _quiet()
    given = {**_given(args), "prompts": [prompt.text for prompt in prompts]}
    launch(Demo(source, device, DTYPES.get(args.dtype), **given), args.host, args.port)


_RUN = {
    "infer": _infer,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "visualize": functools.partial(_infer, maps=True),
    "tune": _tune,
    "demo": _demo,
}
