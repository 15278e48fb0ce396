# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeProfileHook``: what each site and each step costs, while a runner runs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from ...apis.pictures import ResultFolder
from ...cache.skip import CachePatch
from ...errors import ToMeError
from ...meters import process_peak, reset_process_peak, step_module
from ...models import find_adapter
from ...patch import find_patch
from ...settings import Handles
from ...tome.state import TomePatch
from .subject import is_aside, model_of


@HOOKS.register_module()
class ToMeProfileHook(Hook):
    """Measures time and memory of each merged site, each of their blocks, and each step.

    A step is a forward of the network: a denoising step, or a training iteration's forward
    (backward is not in it). A step that is skipped as a whole is one too, in models of MMagic that
    wrap a network of diffusers. The time of a site has its merging and unmerging in it; that of a
    block also the matching. Without token merging in the model, every site of every block is
    measured: the dense figures to compare with.

    At the end of test, validation and training a table goes to the log, and the same with all
    steps to ``tome_profile_<mode>.json`` in the work directory. Validation in between of training
    is not measured.

    Args:
        warm_up: first steps that do not count. Default: 1.
        steps: most steps that are measured; what follows runs undisturbed. Default: 100.

    Times are in milliseconds. On CUDA they come from events, without waiting for the device, and
    memory is the peak of allocated bytes, of a site above what was allocated when it began; the
    hook resets torch's own peak for that. On the CPU memory is known only per step: the peak of
    the process, on Linux.

    Raises:
        ToMeError: when built: arguments that cannot be. At the start of the run: no diffusion
            model in the runner, or a compiled one, which has no sites to look at.

    Priority VERY_LOW: as mmengine's own profiler, its measurements lie inside of all others'.
    """

    priority = "VERY_LOW"

    def __init__(self, warm_up: int = 1, steps: int = 100) -> None:
        for name, value, least in (("warm_up", warm_up, 0), ("steps", steps, 1)):
            if not isinstance(value, int) or value < least:
                raise ToMeError(f"{name}={value!r} of ToMeProfileHook: write {least} or more")
        self.warm_up = warm_up
        self.steps = steps
        self.recorder: Recorder | None = None

    def before_run(self, runner) -> None:
        model = model_of(runner, "ToMeProfileHook")
        for module in model.modules():
            if getattr(module, "_compiled_call_impl", None) is not None or hasattr(
                module, "_orig_mod"
            ):
                raise ToMeError(
                    f"ToMeProfileHook cannot look into the compiled {type(module).__name__}; "
                    "profile without torch.compile"
                )

    def before_train(self, runner) -> None:
        self._start(runner)

    def before_val(self, runner) -> None:
        if self.recorder is None:
            self._start(runner)
            self.recorder.mode = "val"
        else:
            self.recorder.paused = True

    def before_test(self, runner) -> None:
        self._start(runner)

    def after_train(self, runner) -> None:
        self._finish(runner, "train")

    def after_val(self, runner) -> None:
        if self.recorder.mode == "val":
            self._finish(runner, "val")
        else:
            self.recorder.paused = False

    def after_test(self, runner) -> None:
        self._finish(runner, "test")

    def after_run(self, runner) -> None:
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None

    def _start(self, runner) -> None:
        if self.recorder is not None:  # of a run that an error ended
            self.recorder.close()
        self.recorder = Recorder(model_of(runner, "ToMeProfileHook"), self.warm_up, self.steps)

    def _finish(self, runner, mode: str) -> None:
        recorder, self.recorder = self.recorder, None
        recorder.close()
        if not recorder.done:
            runner.logger.warning(
                f"ToMeProfileHook: {recorder.seen} steps with a warm-up of {self.warm_up} leave "
                "nothing to report"
            )
            return
        report = {"mode": mode, **recorder.report()}
        runner.logger.info(table(report))
        if is_main_process():
            ResultFolder(runner.work_dir).save_json(f"tome_profile_{mode}.json", report)


class Recorder:
    """Hooks on a network that note when and with how much memory its sites run.

    Args:
        model: whatever ``apply_tome`` takes.
        warm_up, steps: see :class:`ToMeProfileHook`.

    Attributes:
        seen, done (int): steps, and those of them that were measured.
        paused (bool): whether forwards are none of its business.
    """

    def __init__(self, model: nn.Module, warm_up: int, steps: int) -> None:
        adapter, self.network = find_adapter(model)
        self.handles = Handles.of(model)
        self.device = next(self.network.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.warm_up, self.steps = warm_up, steps
        self.mode: str | None = None
        self.seen = self.done = 0
        self.paused = self.recording = False
        self.peak = 0  # of allocated bytes in the step so far
        self.step_marks: list[tuple[bool, Any, Any, int | None]] = []
        self.records: dict[str, _Record] = {}
        self._hooks: list[Any] = []

        self._hook(step_module(model), self._step_begins, self._step_ends)
        merged = None
        if self.handles.tome is not None:
            merged = {(site["block"], site["kind"]) for site in self.handles.tome.stats()}
        for block in adapter.blocks(self.network):
            # Kinds that are no module of their own, or around more than one.
            modules = {**block.targets, "block": block.module, "stack": block.grid_module}
            if "attn" in modules:
                modules["attn_kv"] = modules["attn"]
            kinds = [k for k in modules if (block.name, k) in merged] if merged else block.targets
            for kind in kinds:
                self._record(f"{block.name}.{kind}", kind, modules[kind])
            if kinds and "block" not in kinds:
                self._record(block.name, "whole block", block.module)

    def _record(self, name: str, kind: str, module: nn.Module) -> None:
        record = self.records[name] = _Record(kind)
        self._hook(
            module,
            lambda module, args, kwargs: self._begins(record, args, kwargs),
            lambda module, args, output: self._ends(record),
        )

    def _hook(self, module: nn.Module, before: Any, after: Any) -> None:
        # Outermost: merging's own hooks run within.
        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self._hooks.append(module.register_forward_hook(after))

    def close(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # --- what the hooks do ------------------------------------------------------------------------

    def _step_begins(self, module, args, kwargs) -> None:
        if self.paused or is_aside():
            return
        self.seen += 1
        self.recording = self.warm_up < self.seen <= self.warm_up + self.steps
        if self.recording:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
                self.peak = 0
            else:
                self.known = reset_process_peak()
            self.merged = self._is_merged()
            self.start = self._mark()

    def _is_merged(self) -> bool:
        """Whether anything is applied to the network in the call that begins."""
        tome, cache = (find_patch(self.network, kind) for kind in (TomePatch, CachePatch))
        if tome is not None and tome.config.merges_nothing:
            tome = None
        return any(one is not None and not one.context.disabled for one in (tome, cache))

    def _step_ends(self, module, args, output) -> None:
        if not self.recording:
            return
        end = self._mark()
        if self.cuda:
            memory = max(self.peak, torch.cuda.max_memory_allocated(self.device))
        else:
            memory = process_peak() if self.known else None
        self.step_marks.append((self.merged, self.start, end, memory))
        self.done += 1
        self.recording = False

    def _begins(self, record: _Record, args, kwargs) -> None:
        if not self.recording:
            return
        x = args[0] if args else kwargs.get("hidden_states")
        record.tokens = x.shape[1] if isinstance(x, torch.Tensor) and x.ndim == 3 else None
        if self.cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
            if record.kind != "whole block":
                # Sites lie within blocks, and there is one peak for all: it is the sites'.
                torch.cuda.reset_peak_memory_stats(self.device)
                record.before = torch.cuda.memory_allocated(self.device)
        record.start = self._mark()

    def _ends(self, record: _Record) -> None:
        if not self.recording or record.start is None:
            return
        record.marks.append((self.merged, record.start, self._mark()))
        record.start = None
        if self.cuda and record.kind != "whole block":
            peak = torch.cuda.max_memory_allocated(self.device)
            memory = record.memory.get(self.merged) or 0
            record.memory[self.merged] = max(memory, peak - record.before)
            self.peak = max(self.peak, peak)

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1000 * (end - start)

    # --- what came of it --------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """JSON-able: ``steps`` in order, ``sites`` in running order.

        Keys of a step: ``merged`` (whether anything is applied; not at ratio 0), ``ms`` and
        ``memory`` (bytes, or None). Of a site: ``site``, ``kind`` (``'whole block'`` for a block
        with all its sites), ``tokens`` and ``kept`` (at its last call), and under ``merged`` and
        ``dense``, each None if there were no such steps: ``calls``, ``ms`` (median of a call),
        ``share`` (of the time of those steps), ``memory`` (bytes, or None).
        """
        if self.cuda:
            torch.cuda.synchronize(self.device)
        steps = [
            {"merged": merged, "ms": self._milliseconds(start, end), "memory": memory}
            for merged, start, end, memory in self.step_marks
        ]
        seen = {}
        if self.handles.tome is not None:
            seen = {site["target"]: site for site in self.handles.tome.stats()}
        sites = []
        for name, record in self.records.items():
            site = {
                "site": name,
                "kind": record.kind,
                "tokens": seen[name]["tokens"] if name in seen else record.tokens,
                "kept": seen[name]["kept"] if name in seen else record.tokens,
            }
            for key, merged in (("merged", True), ("dense", False)):
                times = [self._milliseconds(*marks) for m, *marks in record.marks if m == merged]
                total = sum(step["ms"] for step in steps if step["merged"] == merged)
                site[key] = None
                if times:
                    site[key] = {
                        "calls": len(times),
                        "ms": statistics.median(times),
                        "share": sum(times) / total,
                        "memory": record.memory.get(merged),
                    }
            sites.append(site)
        return {
            "device": str(self.device),
            "merging": self.handles.description or "none",
            "warm_up": min(self.warm_up, self.seen),
            "steps": steps,
            "sites": sites,
        }


class _Record:
    """What was seen of one module."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.marks: list[tuple[bool, Any, Any]] = []
        self.tokens: int | None = None
        self.memory: dict[bool, int] = {}  # with merging, without
        self.start: Any = None
        self.before = 0


def table(report: dict[str, Any]) -> str:
    """A report of :class:`Recorder`, with its ``mode``, as lines of text."""
    lines = [
        f"profile of {report['mode']} on {report['device']}, merging: {report['merging']}, after "
        f"{report['warm_up']} steps of warm-up"
    ]
    for key in ("merged", "dense"):
        steps = [step for step in report["steps"] if step["merged"] == (key == "merged")]
        if not steps:
            continue
        times = [step["ms"] for step in steps]
        memories = [step["memory"] for step in steps]
        memory = "" if None in memories else f", peak memory {max(memories) / 2**20:.0f} MiB"
        lines.append(
            f"{len(steps)} {key} steps: median {statistics.median(times):.2f} ms "
            f"({min(times):.2f} to {max(times):.2f}){memory}"
        )
        rows = [("site", "tokens", "kept", "calls", "ms", "share", "MiB")]
        rows += [_row(site, site[key], key) for site in report["sites"] if site[key]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _row(site: dict[str, Any], figures: dict[str, Any], key: str) -> tuple[str, ...]:
    whole = site["kind"] == "whole block"
    kept = site["kept"] if key == "merged" else site["tokens"]
    return (
        f"{site['site']} (whole block)" if whole else site["site"],
        str(site["tokens"] or "-"),
        "-" if whole else str(kept or "-"),
        str(figures["calls"]),
        f"{figures['ms']:.3f}",
        f"{figures['share']:.1%}",
        "-" if figures["memory"] is None else f"{figures['memory'] / 2**20:.1f}",
    )
