# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeProfileHook``: the time of each step, block and target while a runner runs."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from ...errors import ToMeError
from ...lab.measure import StepMarks
from ...lab.methods import Method
from ...models import find_adapter
from ...settings import Handles, Setting
from .subject import model_of, running_method

STEP = "step (the network)"


@HOOKS.register_module()
class ToMeProfileHook(Hook):
    """Measures the time of each step of the network, each transformer block and each target.

    A step is a call of the network: a denoising step, a skipped one too, or the forward of a
    training iteration. Targets are the modules that can be merged; their time includes merging and
    unmerging, that of a block also the matching. Calls are listed by method: the methods of
    ``ToMeTestLoop`` by their names, otherwise 'baseline', 'merging', 'caching' or 'merging and
    caching', so a ratio of 0 is the baseline. Images of ``ToMeEvalHook`` are not measured.

    At the end of test, validation and training a table goes to the log and ``profile_<mode>.json``
    to the runner's log folder. Validation during training is not measured.

    Args:
        warm_up: First steps of each method that do not count. Default: 1.
        steps: Steps of each method that are measured at most. Default: 100.

    On CUDA, times are those of events, without synchronization.

    Raises:
        ToMeError: When built: invalid arguments. At the start of the run: no diffusion model, or a
            compiled one, whose targets cannot be observed.

    Priority VERY_LOW, as mmengine's ``ProfilerHook``: it measures inside of other hooks.
    """

    priority = "VERY_LOW"

    def __init__(self, warm_up: int = 1, steps: int = 100) -> None:
        for name, value, least in (("warm_up", warm_up, 0), ("steps", steps, 1)):
            if not isinstance(value, int) or value < least:
                raise ToMeError(f"{name}={value!r} of ToMeProfileHook: write {least} or more")
        self.warm_up, self.steps = warm_up, steps
        self.recorder: Recorder | None = None
        self._mode = ""

    def before_run(self, runner) -> None:
        for module in model_of(runner, "ToMeProfileHook").modules():
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
                raise ToMeError(
                    f"ToMeProfileHook cannot observe the compiled {type(module).__name__}; "
                    "profile without torch.compile"
                )

    def before_train(self, runner) -> None:
        self._start(runner, "train")

    def before_val(self, runner) -> None:
        if self.recorder is None:
            self._start(runner, "val")
        self.recorder.paused = self._mode != "val"

    def before_test(self, runner) -> None:
        self._start(runner, "test")

    def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode="train") -> None:
        if mode == self._mode and self.recorder.full:
            self.recorder.close()

    def after_train(self, runner) -> None:
        self._report(runner)

    def after_val(self, runner) -> None:
        self.recorder.paused = False
        if self._mode == "val":
            self._report(runner)

    def after_test(self, runner) -> None:
        self._report(runner)

    def after_run(self, runner) -> None:
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None

    def _start(self, runner, mode: str) -> None:
        self.after_run(runner)  # what a run that failed has left
        self._mode = mode
        model = model_of(runner, "ToMeProfileHook")
        self.recorder = Recorder(model, self.warm_up, self.steps)

    def _report(self, runner) -> None:
        frame = self.recorder.frame()
        self.after_run(runner)
        if frame.empty:
            runner.logger.warning(
                f"ToMeProfileHook: a warm-up of {self.warm_up} leaves no steps to report"
            )
            return
        table = frame.pivot(index="module", columns="method", values="ms")
        table = table.loc[frame["module"].unique(), frame["method"].unique()]
        text = table.rename_axis(None).to_string(float_format="{:.3f}".format, na_rep="-")
        runner.logger.info(f"profile of {self._mode}, median milliseconds of a step:\n{text}")
        if is_main_process():
            file = Path(runner.log_dir, f"profile_{self._mode}.json")
            frame.to_json(file, orient="records", indent=1)


class Recorder:
    """Marks on a network, its transformer blocks and their targets.

    Args:
        model: Whatever ``apply_tome`` takes.
        warm_up, steps: See :class:`ToMeProfileHook`.

    Attributes:
        paused: Whether calls are left out.
    """

    def __init__(self, model: nn.Module, warm_up: int = 1, steps: int = 100) -> None:
        self.model, self.paused = model, False
        self.first, self.end = warm_up, warm_up + steps
        self.done: Counter[str] = Counter()  # method -> steps
        self._stack = ExitStack()
        # (name of a module, its marks, (method, step) of each of them)
        self._marks: list[tuple[str, StepMarks, list[tuple[str, int]]]] = []
        adapter, network = find_adapter(model)
        device = next(network.parameters()).device
        modules: list[tuple[str, nn.Module]] = [(STEP, network)]
        for block in adapter.blocks(network):
            modules.append((f"{block.name} (block)", block.module))
            for kind, target in block.targets.items():
                parts = [target] if isinstance(target, nn.Module) else target
                modules += [(f"{block.name}.{kind}", part) for part in parts]
        for name, module in modules:
            calls: list[tuple[str, int]] = []
            marks = StepMarks(module, device, partial(self._called, name, calls))
            self._marks.append((name, self._stack.enter_context(marks), calls))

    def _called(self, name: str, calls: list[tuple[str, int]]) -> None:
        method = "" if self.paused else self._method()
        calls.append((method, self.done[method]))
        if name == STEP:
            self.done[method] += 1

    def _method(self) -> str:
        """What runs; empty for calls that are left out."""
        method = running_method()
        if method is not None:
            return method
        handles = Handles.of(self.model)
        tome = handles.tome and handles.tome.config
        if tome is not None and tome.merges_nothing:
            tome = None
        setting = Setting(tome, handles.cache and handles.cache.config)
        return Method("applied", setting).label

    @property
    def full(self) -> bool:
        """Whether enough steps of every method so far are measured."""
        counts = [count for method, count in self.done.items() if method]
        return bool(counts) and min(counts) >= self.end

    def frame(self) -> Any:
        """A pandas DataFrame with a row per module and method, in running order: ``module``,
        ``method``, ``ms`` (median time in a step) and ``steps`` (how many were measured)."""
        import pandas

        rows = [
            (name, *call, 1000 * seconds)
            for name, marks, calls in self._marks
            for call, seconds in zip(calls, marks.seconds())
        ]
        calls = pandas.DataFrame(rows, columns=["module", "method", "step", "ms"])
        calls = calls[calls.step.between(self.first, self.end - 1) & (calls.method != "")]
        steps = calls.groupby(["module", "method", "step"], sort=False)["ms"].sum()
        groups = steps.groupby(["module", "method"], sort=False)
        return groups.agg(ms="median", steps="count").reset_index()

    def close(self) -> None:
        """Take the marks away again."""
        self._stack.close()
