# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Time and memory of one forward, or of N steps, of a network: all methods, interleaved.

Every method gets a copy of the network that shares its weights, so all of them are ready at the
same time, compiled ones too. Rows of the folder, for each case (a dict of :data:`CASE`)::

    {'kind': 'run', **case, 'method', 'relative_error', 'peak_bytes',
     'note': why it cannot run, or None}
    {'kind': 'case', **case, 'method', 'turn', 'seconds'}
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..errors import ToMeError
from ..settings import Handles, Setting
from ..timeline import scheduler_of
from ..validate import check_choice, check_integer
from .cost import add_rounds, missing_turns, record_calls
from .environment import environment
from .ideal import ideal
from .measure import Clock, interleaved, peak_memory
from .methods import BASELINE, Method, check_names
from .networks import Network, Work, check_network, share_weights, work_on
from .progress import progress_bar
from .request import Request, make_request
from .results import RunFolder
from .runners import runner_of
from .runners.base import Source
from .table import timing

MODES = ("eager", "compiled")
# The work of one case, its size, and its batch.
_Work = tuple[Work, tuple[int, int], int]
CASE = ("size", "batch", "dtype", "mode", "steps")


def benchmark(
    network: str | Source,
    methods: Sequence[Method] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = (),
    steps: int = 1,
    rounds: int = 7,
    folder: str | os.PathLike = "work_dirs/benchmark",
    device: str | torch.device = "cpu",
    *,
    mode: str = "eager",
    clock: str = "wall",
    with_ideal: bool = True,
    memory: bool = True,
    request: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Measure a network with some methods; every combination of the lists is a case.

    Args:
        network: A name in :data:`~.networks.NETWORKS`, with random weights; or a source, whose
            network is called as the model itself calls it.
        methods: Besides the baseline. Default: see :func:`default_methods`.
        sizes: (height, width) in pixels. Default: the network's own.
        batches: Of the network, or images per call of a source's model. Default: 2, one image
            with guidance; 1.
        dtypes: Of the whole network. Default: float32; that of a source's weights.
        steps: So many calls at falling timesteps are one measurement. Default: 1; step caching and
            ``plan_interval`` have no effect in a single forward.
        rounds: How often each method runs, after a run that is not counted.
        folder: Rows go there; what it has of the same benchmark is not measured again.
        device, clock: Where to run, and the ``kind`` of :class:`~.measure.Clock`.
        mode: ``'eager'`` or ``'compiled'``.
        with_ideal: Whether to measure the ideal of each method that merges, see :mod:`.ideal`.
        memory: Whether to measure the peak of a fresh run.
        request: Given fields of a source's :class:`~.request.Request`.

    Returns:
        DataFrame: See :func:`summary`.

    Raises:
        ToMeError: Something that is not valid; the baseline runs in none of the cases.
    """
    if methods is None:
        methods = default_methods(None if isinstance(network, str) else network.setting)
    methods = [BASELINE, *(method for method in methods if method.kind != "baseline")]
    check_methods(methods)
    check_choice("", "mode", mode, MODES)
    for key, value in (("steps", steps), ("rounds", rounds), ("batch", min(batches or [1]))):
        check_integer("", key, value, 1)
    timer = Clock(device, clock)
    by_name = isinstance(network, str)
    if by_name:
        entry = check_network(network, sizes or ())
        cases = itertools.product(sizes or [(entry.size, entry.size)], batches or [2])
        works = _named(entry, list(cases), timer.device, dtypes, steps)
    else:
        cases = itertools.product(sizes or [None], batches or [1])
        requests = [_request(network, *case, steps, request or {}) for case in cases]
        works = _recorded(network, requests, timer.device, dtypes, steps)
    manifest = {
        "command": "benchmark",
        "model": network if by_name else network.name,
        "source": network if by_name else network.path,
        "clock": clock,
        "environment": environment(device),
        "methods": {method.name: method.to_dict() for method in methods},
    }
    with RunFolder(folder).writing(manifest) as folder:
        for work, size, batch in works:
            dtype = str(next(work.network.parameters()).dtype).replace("torch.", "")
            values = (list(size), batch, dtype, mode, steps)
            one = _Case(folder, dict(zip(CASE, values)), work, timer)
            with torch.inference_mode():
                one.run(methods, with_ideal, memory, rounds)
            del work, one  # before the next one is built
    frame = summary(folder)
    if "seconds" not in frame:
        raise ToMeError(f"nothing could be measured: {frame['note'].iloc[0]}")
    return frame


def _named(
    entry: Network,
    cases: Sequence[tuple[tuple[int, int], int]],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    steps: int,
) -> Iterator[_Work]:
    """The work of every case on a network with random weights."""
    for dtype in dtypes or [torch.float32]:
        built = entry.build(device, dtype)
        for size, batch in cases:
            yield work_on(entry, built, size, batch, steps), size, batch
        del built


def _request(
    source: Source,
    size: tuple[int, int] | None,
    batch: int,
    steps: int,
    given: Mapping[str, Any],
) -> Request:
    """The request of a case, checked. Few schedulers can do a single step, so it has two."""
    given = {"prompts": ["a red apple"], **given, "steps": max(2, steps), "batch_size": batch}
    prompts = list(itertools.islice(itertools.cycle(given["prompts"]), batch))
    request = make_request(source, **{**given, "prompts": prompts, "size": size})
    source.check(request)
    return request


def _recorded(
    source: Source,
    requests: Sequence[Request],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    steps: int,
) -> Iterator[_Work]:
    """The work of every case on the network of a source, called as its model calls it."""
    for dtype in dtypes or [None]:
        model = source.load(requests[0], device, dtype).model
        for request in requests:
            runner = runner_of(model, request, source)
            with BASELINE.on(model):
                calls = record_calls(runner, range(request.batch_size))
            several = steps > 1
            scheduler = scheduler_of(model) if several else None
            work = Work(runner.network, calls if several else calls[:1], scheduler)
            yield work, runner.size, request.batch_size
        del model


def check_methods(methods: Sequence[Method]) -> None:
    """Raise ToMeError for two methods of one name, one with steps of its own, or one that is named
    as the ideal is."""
    check_names(methods)
    for method in methods:
        if method.steps is not None:
            raise ToMeError(
                f"method {method.name!r} has steps of its own, whose images differ; use evaluate"
            )
        if method.slug.startswith("ideal"):
            raise ToMeError(f"{method.name!r} is the name of what the benchmark adds; rename it")


def default_methods(setting: Setting | None = None) -> list[Method]:
    """A source's setting if it has one; else ours at ratio 0.5, and tomesd if it is installed."""
    if setting is not None and not setting.baseline:
        return [Method("ours", setting)]
    methods = [Method("ours", Setting.coerce({"ratio": 0.5}))]
    with contextlib.suppress(ToMeError):
        methods.append(Method("tomesd", tomesd=0.5))
    return methods


class _Case:
    """Runs the methods of one case and adds rows to the folder."""

    def __init__(self, folder: RunFolder, case: dict[str, Any], work: Work, timer: Clock) -> None:
        self.folder, self.case, self.work, self.timer = folder, case, work, timer
        self.ready: dict[str, tuple[nn.Module, Handles]] = {}
        self.reference: Tensor | None = None

    def run(self, methods: Sequence[Method], with_ideal: bool, memory: bool, rounds: int) -> None:
        """Make all methods ready, which measures their memory; then measure their times."""
        ideals: set[tuple] = set()
        with contextlib.ExitStack() as stack:
            for method in methods:
                self._start(method, memory, stack)
                if not self.ready:  # not even the baseline runs
                    break
                removed = self._removed(method) if with_ideal else None
                if removed is None or removed in ideals:
                    continue
                name = f"ideal for {method.name}" if ideals else "ideal"
                ideals.add(removed)
                stats = self.ready[method.name][1].tome.stats()
                best = Method(name, function=partial(ideal, stats=stats))
                self._start(best, memory, stack)
            self._measure(rounds)

    def _start(self, method: Method, memory: bool, stack: contextlib.ExitStack) -> None:
        """Run a method for the first time, and add its row, which may say why it cannot run."""
        known = self.folder.has(kind="run", note=None, method=method.name, **self.case)
        found = dict.fromkeys(("relative_error", "peak_bytes", "note"))
        with contextlib.ExitStack() as own:
            try:
                found.update(self._first_run(method, memory and not known, own))
            except Exception as error:  # whatever it is, the other methods can go on
                kind = "" if isinstance(error, ToMeError) else f"{type(error).__name__}: "
                found["note"] = (kind + " ".join(str(error).split()))[:300]
            else:
                stack.push(own.pop_all())
        if self.timer.device.type == "cuda":
            torch.cuda.empty_cache()
        if found["note"] or not known:
            self.folder.add({"kind": "run", **self.case, "method": method.name, **found})

    def _first_run(
        self, method: Method, memory: bool, stack: contextlib.ExitStack
    ) -> dict[str, Any]:
        if self.reference is None:
            self.reference = self.work(self.work.network).float().cpu()
        network = model = share_weights(self.work.network)
        if self.work.scheduler is not None:
            model = SimpleNamespace(unet=network, scheduler=self.work.scheduler)
        handles = stack.enter_context(method.on(model))
        if self.case["mode"] == "compiled":
            network = _compiled(network)
            self.work(network)
        handles.reset_run()
        outputs: list[Tensor] = []

        def work() -> None:
            outputs.append(self.work(network))

        peak = peak_memory(work, self.timer.device) if memory else work()
        change = (outputs[0].float().cpu() - self.reference).pow(2).mean().sqrt()
        if not change.isfinite():
            raise ToMeError("its output has NaN or infinity")
        if change == 0 and method.kind != "baseline":
            hint = "; step caching needs several steps" if self.case["steps"] == 1 else ""
            raise ToMeError(f"it changes nothing: its output is the baseline's{hint}")
        self.ready[method.name] = network, handles
        error = float(change / self.reference.std()) if change else 0.0
        return {"relative_error": error, "peak_bytes": peak}

    def _removed(self, method: Method) -> tuple | None:
        """What tokens a method removes where; None if it has no ideal."""
        handles = self.ready.get(method.name, (None, Handles()))[1]
        if handles.tome is None or handles.cache is not None:
            return None
        stats = handles.tome.stats()
        if all(site["kept"] in (site["tokens"], None) for site in stats):
            return None
        return tuple((site["target"], site["kept"]) for site in stats)

    def _measure(self, rounds: int) -> None:
        if not self.ready:
            return
        turns = missing_turns(self.folder.find(kind="case", **self.case), self.ready, rounds)

        def measured(network: nn.Module, handles: Handles) -> float:
            handles.reset_run()
            seconds = self.timer(lambda: self.work(network))[0]
            bar.update()
            return seconds

        calls = {name: partial(measured, *ready) for name, ready in self.ready.items()}
        with progress_bar(len(turns) * len(calls), case_text(self.case), "run") as bar:
            rows = (
                {"kind": "case", **self.case, "method": name, "turn": turn, "seconds": seconds}
                for turn, name, seconds in interleaved(calls, turns)
            )
            add_rounds(self.folder, rows, len(calls))


def _compiled(network: nn.Module) -> nn.Module:
    import torch._dynamo.config as dynamo

    # All methods are versions of the same code, and each has guards of its own.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(dynamo, name):
            setattr(dynamo, name, max(64, getattr(dynamo, name)))
    return torch.compile(network)


# --- what was found -------------------------------------------------------------------------------


def case_text(case: Mapping[str, Any]) -> str:
    """A case in words."""
    height, width = case["size"]
    text = f"{height}x{width}, batch {case['batch']}, {case['dtype']}, {case['mode']}"
    return text + (f", {case['steps']} steps" if case["steps"] > 1 else "")


def summary(folder: RunFolder) -> pd.DataFrame:
    """The figures of a folder, one row per case and method.

    Columns: ``case`` in words and :data:`CASE`; ``method``; those of :func:`~.table.timing` with
    the ``coverage`` of the interval; ``memory`` (peak bytes); ``relative_error`` of the output;
    ``note``: why a method could not be measured.
    """
    seconds: dict[tuple[str, str], dict[int, float]] = {}
    for row in folder.find(kind="case"):
        seconds.setdefault((case_text(row), row["method"]), {})[row["turn"]] = row["seconds"]
    entries = []
    for row in {(case_text(row), row["method"]): row for row in folder.find(kind="run")}.values():
        case, name = case_text(row), row["method"]
        both = (seconds.get((case, one), {}) for one in (BASELINE.name, name))
        entry = {"case": case, **{key: row[key] for key in CASE}, "method": name, **timing(*both)}
        found = {"memory": row["peak_bytes"], "relative_error": row["relative_error"]}
        entries.append({**entry, **found, "note": row["note"]})
    return pd.DataFrame(entries)
