# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Time and memory of one forward, or of N steps, of a network: all methods, interleaved.

Every method gets a copy of the network that shares its weights, so all of them are ready at the
same time, compiled ones too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ToMeError, one_line
from ..settings import Setting
from ..timeline import scheduler_of
from ..validate import check_choice, check_integer
from .cost import missing_turns
from .environment import environment
from .measure import interleaved, peak_memory, timed
from .methods import BASELINE, Method, check_names
from .networks import Arguments, Work, check_network, share_weights, work_on
from .progress import progress_bar
from .request import Request, make_request
from .results import RunFolder
from .runners.base import Runner, Source
from .table import table

MODES = ("eager", "compiled")
_LATENTS = ("hidden_states", "sample", "x")  # the argument of a network that they are


def benchmark(
    network: str | Source,
    methods: Sequence[Method] | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    rounds: int = 7,
    folder: str | os.PathLike = "work_dirs/benchmark",
    device: str | torch.device = "cpu",
    mode: str = "eager",
    request: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Measure a network with some methods.

    Args:
        network: A name in :data:`~.networks.NETWORKS`, with random weights; or a source, whose
            network is called with the arguments that the model itself passes.
        methods: Besides the baseline. Default: see :func:`default_methods`.
        size: (height, width) in pixels. Default: the network's own.
        batch: Of the network; images per call of a source's model. Default: 2, one image with
            guidance; 1.
        dtype: Of the whole network. Default: float32; that of a source's weights.
        steps: So many calls at falling timesteps are one measurement. Default: 1; step caching and
            ``plan_interval`` have no effect in a single forward.
        rounds: How often each method runs, after a run that is not counted.
        folder: Rows go there; what it has of the same benchmark is not measured again.
        device: Where to run.
        mode: ``'eager'`` or ``'compiled'``.
        request: Other fields of a source's :class:`~.request.Request`. Default: those of its
            config, of one prompt.

    Returns:
        DataFrame: See :func:`~.table.table`; ``relative_error`` is that of the output. A method
        that cannot run is missing there, and noted in the folder.

    Raises:
        ToMeError: Something that is not valid; the baseline cannot run.
    """
    named = isinstance(network, str)
    if methods is None:
        methods = default_methods(None if named else network.setting)
    methods = [BASELINE, *(method for method in methods if method.kind != "baseline")]
    check_methods(methods)
    check_choice("", "mode", mode, MODES)
    batch, steps = batch or (2 if named else 1), steps or 1
    for key, value in (("steps", steps), ("rounds", rounds), ("batch", batch)):
        check_integer("", key, value, 1)
    if named:
        entry = check_network(network, size)
        size = size or (entry.size, entry.size)
        built = entry.build(device, dtype or torch.float32)
        work = work_on(entry, built, size, batch, steps)
    else:
        runner = network.load(case_request(network, size, batch, steps, request), device, dtype)
        work, size = _recorded(runner, steps), runner.size
    dtype = next(work.network.parameters()).dtype
    manifest = {
        "command": "benchmark",
        "model": network if named else network.name,
        "source": network if named else network.path,
        "request": {"steps": steps, "size": list(size), "batch_size": batch},
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "environment": environment(device),
        "methods": {method.name: method.to_dict() for method in methods},
    }
    with RunFolder(folder).writing(manifest) as folder, torch.inference_mode():
        _measure(work, methods, mode, rounds, folder, torch.device(device))
    return table(folder)


def check_methods(methods: Sequence[Method]) -> None:
    """Raise ToMeError for two methods of one name, or one with steps of its own."""
    check_names(methods)
    for method in methods:
        if method.steps is not None:
            raise ToMeError(
                f"method {method.name!r} has steps of its own, whose images differ; use evaluate"
            )


def default_methods(setting: Setting | None = None) -> list[Method]:
    """A source's setting if it does anything; else ours at ratio 0.5, and tomesd if it is
    installed."""
    if setting is not None and not setting.baseline:
        return [Method("ours", setting)]
    methods = [Method("ours", Setting.coerce({"ratio": 0.5}))]
    with contextlib.suppress(ToMeError):
        methods.append(Method("tomesd", tomesd=0.5))
    return methods


# --- networks of sources --------------------------------------------------------------------------


def case_request(
    source: Source,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    steps: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> Request:
    """The request whose calls are recorded; ToMeError if the source cannot serve it."""
    given = {"prompts": ["a red apple"], **(given or {})}
    prompts = list(itertools.islice(itertools.cycle(given["prompts"]), batch or 1))
    # Few schedulers can do a single step.
    case = {"prompts": prompts, "steps": max(2, steps or 1), "size": size, "batch_size": batch or 1}
    request = make_request(source, **{**given, **case})
    source.check(request)
    return request


def _recorded(runner: Runner, steps: int) -> Work:
    """The calls of the network in a run of the baseline, or the first one alone."""
    with BASELINE.on(runner.model):
        calls = record_calls(runner)
    if steps == 1:
        return Work(runner.network, calls[:1], None)
    return Work(runner.network, calls, scheduler_of(runner.model))


def record_calls(runner: Runner) -> list[Arguments]:
    """The arguments of every call of the network in a run, all with the latents of the first.

    Latents of later steps belong to the baseline's outputs, and step caching checks that latents
    follow from its own; equal ones do.
    """
    calls: list[Arguments] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        name = next((name for name in _LATENTS if name in kwargs), None)
        if calls and args and _same_shape(args[0], calls[0][0][0]):
            args = (calls[0][0][0], *args[1:])
        elif calls and not args and _same_shape(kwargs.get(name), calls[0][1].get(name)):
            kwargs[name] = calls[0][1][name]
        calls.append((args, kwargs))

    hook = runner.network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        runner.run(range(len(runner.request)))
    finally:
        hook.remove()
    return calls


def _same_shape(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


# --- measuring ------------------------------------------------------------------------------------


def _measure(
    work: Work,
    methods: Sequence[Method],
    mode: str,
    rounds: int,
    folder: RunFolder,
    device: torch.device,
) -> None:
    """Make all methods ready, which measures their memory; then measure their times."""
    ready: dict[str, Callable[[], Tensor]] = {}
    reference = None
    with contextlib.ExitStack() as stack:
        for method in methods:
            with contextlib.ExitStack() as own:
                try:
                    run = own.enter_context(_ready(work, method, mode))
                    output, peak = _first_run(run, device)
                    reference = output if reference is None else reference
                    error = _relative_error(method, output, reference)
                except Exception as error:  # whatever it is, the other methods can go on
                    kind = "" if isinstance(error, ToMeError) else f"{type(error).__name__}: "
                    reason = kind + one_line(error)
                    if method is BASELINE:
                        raise ToMeError(f"the baseline cannot run: {reason}") from error
                    folder.note(f"{method.name}: {reason}")
                    continue
                ready[method.name] = run
                stack.push(own.pop_all())
            known = {"method": method.name, "images": 1}
            if not folder.has(kind="memory", method=method.name):
                folder.add({"kind": "memory", **known, "run_bytes": peak, "relative_error": error})
        turns = missing_turns(folder.find(kind="round"), ready, rounds)
        with progress_bar(len(turns) * len(ready), "benchmark", "run") as bar:

            def seconds(run: Callable[[], Tensor]) -> float:
                bar.update()
                return timed(run, device)[0]

            calls = {name: partial(seconds, run) for name, run in ready.items()}
            for turn in turns:
                known = {"kind": "round", "turn": turn, "images": 1}
                found = {name: seconds for _, name, seconds in interleaved(calls, [turn])}
                folder.add(*({**known, "method": name, "seconds": found[name]} for name in found))


@contextlib.contextmanager
def _ready(work: Work, method: Method, mode: str) -> Iterator[Callable[[], Tensor]]:
    """Yields a function that does the work once with a method, from a fresh state."""
    network = model = share_weights(work.network)
    if work.scheduler is not None:
        model = SimpleNamespace(unet=network, scheduler=work.scheduler)
    with method.on(model) as handles:
        if mode == "compiled":
            network = _compiled(network)
            work(network)
            # Outputs that are kept would be freed within the first run, and hide its peak.
            handles.reset_run()

        def run() -> Tensor:
            handles.reset_run()
            return work(network)

        yield run


def _compiled(network: nn.Module) -> nn.Module:
    import torch._dynamo.config as dynamo

    # All methods are versions of the same code, and each has guards of its own.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(dynamo, name):
            setattr(dynamo, name, max(64, getattr(dynamo, name)))
    return torch.compile(network)


def _first_run(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """The output in float32 on the CPU, and the peak of memory."""
    outputs: list[Tensor] = []
    peak = peak_memory(lambda: outputs.append(run()), device)
    return outputs[0].float().cpu(), peak


def _relative_error(method: Method, output: Tensor, reference: Tensor) -> float:
    """Root mean square difference over the standard deviation of the baseline's output."""
    change = (output - reference).pow(2).mean().sqrt()
    if not change.isfinite():
        raise ToMeError("its output has NaN or infinity")
    if change == 0 and method.kind != "baseline":
        raise ToMeError(
            "it changes nothing: its output is the baseline's (step caching needs several steps)"
        )
    return float(change / reference.std())
