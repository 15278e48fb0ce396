# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What ``tools/benchmark.py`` does after its own cheap checks in ``cli.py``."""

from __future__ import annotations

import itertools
import os
import sys
import time

import torch

from ..apis.command_line import one_line
from ..errors import ToMeError
from . import targets
from .attention import WRITTEN_OUT
from .fits import check_fits
from .report import case_json, case_table, environment, environment_text, write_json
from .rounds import Case, run_case
from .targets import DEMO, Target, build_config, build_demo, build_shape

# Of the two minutes of --quick: what is left for building and measuring. The rest is for importing
# torch before this, and for a round that turns out longer than the one before it.
QUICK_SECONDS = 80.0
# Sides that --quick may choose, and how many times longer a forward takes than at the last.
QUICK_SIDES = {256: 8, 192: 3, 128: 1}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def command(args, argv: list[str]) -> None:
    """Build, measure and report every case; see ``cli.py`` for ``args``.

    The file of ``--json`` is written anew after every case, so that an interruption costs one.

    Raises:
        ToMeError: nothing could be measured.
        KeyboardInterrupt: its message says what is there already.
    """
    until = time.monotonic() + QUICK_SECONDS if args.quick else None
    if args.threads:
        torch.set_num_threads(args.threads)
    elif args.quick and _is_busy():
        # Threads that wait for each other on busy cores take many times as long as one alone.
        torch.set_num_threads(1)
    _check_all_fit(args)
    _quiet_diffusers()
    where = environment(args.device)
    merged = ", ".join(f"{name} {value}" for name, value in args.everybody.items())
    measured_in = "CPU seconds of the process" if args.clock == "cpu" else "wall time"
    heading = f"{args.target}, {merged}, {measured_in}"
    content = dict(
        command=["python", "tools/benchmark.py", *argv],
        target=args.target,
        rounds=args.rounds,
        clock=args.clock,
        environment=where,
        skipped=[],
        cases=[],
    )
    drawn = []
    try:
        for target, case in _cases(args, until):
            try:
                measured = run_case(
                    target,
                    case,
                    args.contenders,
                    args.config,
                    args.own,
                    args.rounds,
                    args.device,
                    args.clock,
                    not args.no_memory,
                    until,
                )
            except ToMeError as error:
                content["skipped"].append(str(error))
                print(f"\nskipped: {one_line(error)}")
                continue
            if not drawn:
                print(f"\n{heading}\n{environment_text(where)}")
            label = f"{case}, {measured['parameters'] / 1e6:.0f} M parameters"
            print(f"\n### {label}\n\n{case_table(measured, case.batch)}")
            drawn.append(dict(label=label, results=measured["results"]))
            content["cases"].append(case_json(vars(case), measured))
            if args.json:
                write_json(args.json, content)
    except KeyboardInterrupt:
        done = f"; the cases before this one ({len(drawn)}) are in {args.json}"
        raise KeyboardInterrupt(done if args.json and drawn else "") from None
    if not drawn:
        raise ToMeError(f"nothing could be measured: {content['skipped'][0]}")
    if args.json:
        write_json(args.json, content)
        print(f"\nwritten to {args.json}")
    if args.plot:
        from .plot import write_plot

        write_plot(args.plot, heading, drawn)
        print(f"\ndrawn in {args.plot}")


def _cases(args, until: float | None):
    """Every combination of options, as (target, case); a network is built once per precision."""
    for dtype in args.dtype:
        print(f"building {args.target} ({dtype}) on {args.device}", file=sys.stderr)
        if args.target == DEMO:
            target = build_demo(args.device, TORCH_DTYPES[dtype])
        elif args.target in targets.SHAPES:
            target = build_shape(args.target, args.device, TORCH_DTYPES[dtype])
        else:
            target = build_config(
                args.target, args.device, TORCH_DTYPES.get(dtype), tuple(args.cfg_options)
            )
        for size, batch, attention, mode in itertools.product(
            args.size, args.batch, args.attention, args.mode
        ):
            if args.fit_size:
                side = _fitting_side(target, batch, len(args.contenders) + len(args.own), until)
                size = (side, side)
            yield target, Case(size or target.size, batch, dtype, attention, mode, args.steps)


def _is_busy() -> bool:
    """Whether other programs used more than half of the cores in the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2


def _fitting_side(target: Target, batch: int, contenders: int, until: float) -> int:
    """The largest of :data:`QUICK_SIDES` at which three rounds and the memory fit before ``until``.

    Told from the second forward at the smallest: the first of a process is no measure.
    """
    smallest = min(QUICK_SIDES)
    call = target.call((smallest, smallest), batch)
    with torch.inference_mode():
        call(target.network)
        start = time.monotonic()
        call(target.network)
    seconds = time.monotonic() - start
    # Everybody runs once to get ready, three rounds, and once more under the profiler.
    forwards = 5 * contenders
    left = until - time.monotonic()
    for side, longer in QUICK_SIDES.items():
        if forwards * longer * seconds < left:
            return side
    return smallest


def _check_all_fit(args) -> None:
    """All cases before the first is built: an hour's run must not end with this."""
    if args.target not in targets.SHAPES:
        return
    for size, batch, dtype, attention in itertools.product(
        args.size, args.batch, args.dtype, args.attention
    ):
        check_fits(
            args.target,
            targets.SHAPES[args.target],
            size,
            batch,
            TORCH_DTYPES[dtype],
            args.device,
            attention in WRITTEN_OUT,
        )


def _quiet_diffusers() -> None:
    """Keep diffusers' notes out of the output."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
