# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The commands: ``python -m mmagic_tome infer|evaluate|benchmark|visualize|tune``.

``tools/VERB.py`` are the same. Nothing slow is imported before the options are parsed. Exit codes:
0 done, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ToMeError
from . import options
from .options import NOT_GIVEN, Parser, exit_code
from .request import Request

#: Verb -> what it does.
VERBS = {
    "infer": "generate images or clips; with --compare measure against the baseline",
    "evaluate": "compare methods on many prompts: metrics, cost, a report",
    "benchmark": "time and memory of one forward or some steps of a network, by methods",
    "visualize": "which tokens are merged, and where images change",
    "tune": "not there any more: evaluate compares settings",
}
_EXAMPLES = {
    "infer": "CONFIG --prompt 'red apple' --cache balanced --compare",
    "evaluate": "CONFIG --prompt-file demo --limit 50 --method tome:0.5 --method steps:13",
    "benchmark": "sd15 --size 256 512 --method tome:0.5 --method tomesd:0.5",
    "visualize": "CONFIG --prompt 'red apple' --ratio 0.5",
}
_DEFAULTS = {
    "infer": "mmagic_tome::demo/sd-emoji_tome-balanced.py",
    "evaluate": "mmagic_tome::demo/sd-emoji_tome-balanced.py",
    "visualize": "mmagic_tome::demo/sd-emoji_tome-5e-1.py",
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        argv: The verb and its options. Default: those of the process.
        prog: Name shown in help and errors. Default: ``mmagic_tome VERB``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv else ""

    def run() -> None:
        if verb not in VERBS:
            raise ToMeError(f"there is no verb {verb!r}; write one of {', '.join(VERBS)}")
        args = build_parser(verb, prog).parse_args(argv[1:])
        if verb == "tune":
            raise ToMeError(
                "tune is not there any more; compare settings with evaluate: --method tome:0.25 "
                "--method cache:balanced --method steps:13 ..."
            )
        # Deprecation notes between libraries are not this command's business.
        warnings.filterwarnings("ignore")
        _RUN[verb](args)

    return exit_code(run, prog or f"mmagic_tome {verb}".strip())


def build_parser(verb: str, prog: str | None = None) -> Parser:
    """The parser of a verb. Options that are not given are None, empty or ``NOT_GIVEN``."""
    parser = Parser(
        prog=prog or f"mmagic_tome {verb}",
        description=VERBS[verb],
        epilog=f"example: python -m mmagic_tome {verb} {_EXAMPLES.get(verb, '')}",
        allow_abbrev=False,
    )
    if verb != "tune":
        if verb != "benchmark":
            options.source_options(parser, _DEFAULTS[verb])
            options.request_options(parser)
        options.run_options(parser, cases=verb == "benchmark")
        options.method_options(parser)
        options.result_options(parser)
        if verb != "visualize":
            getattr(options, f"{verb}_options")(parser)
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
    return {field.name: vars(args)[field.name] for field in fields(Request)[1:]}


def _request(args: argparse.Namespace, source: Any) -> Any:
    from .prompts import request_fields
    from .runners import make_request

    given, prompts = _given(args), _prompts(args)
    if prompts:
        usual = {**source.defaults, **{key: one for key, one in given.items() if one is not None}}
        given.update(request_fields(prompts, usual.get("seed", 0), usual.get("negative_prompt")))
    return make_request(source, **given)


def _methods(args: argparse.Namespace, setting: Any) -> list[Any]:
    """The config's setting, changed by ``--ratio`` and ``--cache``, if it does anything; then
    those of ``--method``."""
    from ..settings import Setting
    from .methods import Method, parse_method

    if args.ratio is not None:
        setting = setting.replace(ratio=args.ratio) if args.ratio else Setting(cache=setting.cache)
    if args.cache is not NOT_GIVEN:
        setting = setting.replace(cache=args.cache)
    found = [] if setting.baseline else [Method(setting.description, setting)]
    return found + [parse_method(text) for text in args.method]


def _method(args: argparse.Namespace, source: Any) -> Any:
    """The one method that is applied: that of ``--method``, else what the config applies."""
    from .methods import BASELINE

    if args.method and (args.ratio is not None or args.cache is not NOT_GIVEN):
        raise ToMeError("--ratio and --cache change the config's setting; write both into --method")
    if len(args.method) > 1:
        raise ToMeError("only one --method can be applied; evaluate compares several")
    return [BASELINE, *_methods(args, source.setting)][-1]


@contextlib.contextmanager
def _results(args: argparse.Namespace, name: str) -> Iterator[Path]:
    """A folder for results; an empty one is not left behind."""
    from .results import new_folder

    work_dir = _work_dir(args, name)
    folder = new_folder(work_dir, getattr(args, "resume", False))
    try:
        yield folder
    except KeyboardInterrupt:
        if not (hasattr(args, "resume") and (folder / "manifest.json").exists()):
            raise
        raise KeyboardInterrupt(f"; --resume goes on with {folder}") from None
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
            work_dir.rmdir()


def _work_dir(args: argparse.Namespace, name: str) -> Path:
    return Path(args.work_dir or f"work_dirs/{name}")


def _goes_on(args: argparse.Namespace, name: str, title: str, methods: Sequence[Any]) -> bool:
    """Print what is run, on one rank; whether it is run now, and is no dry run."""
    from mmengine.dist import get_rank

    _quiet()
    if get_rank() > 0:
        return not args.dry_run
    print(title)
    for method in methods:
        print(f"  {method.name}" + (f" ({method.label})" if method.label != method.name else ""))
    if args.dry_run:
        print(f"results would go to {_work_dir(args, name)}/<time>; nothing was run")
    return not args.dry_run


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
    with contextlib.suppress(ImportError):
        from diffusers.utils import logging as of_diffusers

        of_diffusers.set_verbosity_error()
        of_diffusers.disable_progress_bar()
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as of_transformers

        of_transformers.set_verbosity_error()
        of_transformers.disable_progress_bar()
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel("WARNING")


# --- verbs ----------------------------------------------------------------------------------------


def _infer(args: argparse.Namespace) -> None:
    from .devices import DTYPES, check_device
    from .infer import check, infer
    from .methods import BASELINE

    source, device = _source(args), check_device(args.device)
    request, method = _request(args, source), _method(args, source)
    check(source, request, method, args.compare)
    methods = [BASELINE, method] if args.compare else [method]
    if _goes_on(args, source.name, _title(source, request, device), methods):
        with _results(args, source.name) as folder:
            how = {"compare": args.compare, "rounds": args.rounds, "folder": folder}
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
    given["prompts"] = [
        {"prompt": one.text, "negative_prompt": one.negative, "seed": one.seed}
        for one in _prompts(args)
    ]
    # Without any of these the config's own list of methods counts.
    if args.method or args.ratio is not None or args.cache is not NOT_GIVEN:
        given["methods"] = _methods(args, source.setting)
    plan = plan_of(source, **given, **_given(args))
    source.check(plan.request)
    title = _title(source, plan.request, device)
    if not _goes_on(args, source.name, title, [BASELINE, *plan.methods]):
        return
    with _results(args, source.name) as folder:
        evaluate(source, folder=folder, device=device, **vars(plan))
        if get_rank() == 0:
            _report(folder)


def _benchmark(args: argparse.Namespace) -> None:
    from ..settings import Setting
    from .benchmark import benchmark, check_methods, default_methods
    from .devices import DTYPES, check_device
    from .methods import BASELINE
    from .networks import check_network

    device, name = check_device(args.device), args.network
    check_network(name, args.size or ())
    methods = _methods(args, Setting()) or default_methods()
    check_methods(methods)
    title = f"{name} on {device}: {args.steps or 1} steps, {args.rounds} rounds"
    if not _goes_on(args, name, title, [BASELINE, *methods]):
        return
    dtypes = [DTYPES[one] for one in args.dtype or ("fp32",)]
    with _results(args, name) as folder:
        cases = (args.size, args.batch_size, dtypes, args.steps or 1, args.rounds)
        how = {"mode": args.mode, "clock": args.clock}
        how.update(with_ideal=not args.no_ideal, memory=not args.no_memory)
        benchmark(name, methods, *cases, folder, device, **how)
        _report(folder)


def _report(folder: Path) -> None:
    from .report import write_report
    from .results import RunFolder

    page = write_report(RunFolder(folder))
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"Report: {page}")


def _visualize(args: argparse.Namespace) -> None:
    from .devices import DTYPES, check_device
    from .methods import BASELINE
    from .visualize import check, visualize

    source, device = _source(args), check_device(args.device)
    method = _method(args, source)
    if method is BASELINE and args.ratio is None:  # a bare pipeline, say
        args.ratio = 0.5
        method = _method(args, source)
    request = _request(args, source)
    check(source, request, method)
    if _goes_on(args, source.name, _title(source, request, device), [BASELINE, method]):
        with _results(args, source.name) as folder:
            how = {"device": device, "dtype": DTYPES.get(args.dtype)}
            visualize(source, request, method, folder=folder, **how)


_RUN = {
    "infer": _infer,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "visualize": _visualize,
}
