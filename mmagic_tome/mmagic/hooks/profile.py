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
from ...models import find_adapter
from .subject import iteration_of, label_of, model_of, running

STEP = "step (the network)"


@HOOKS.register_module()
class ToMeProfileHook(Hook):
    """Measures the time of each step of the network, each transformer block and each target.

    A step is a call of the network: a denoising step, a skipped one too, or the forward of a
    training iteration. Targets are the modules around which tokens can be merged: their time
    includes merging and unmerging, that of a block also the matching. Times are listed by method:
    those of ``ToMeTestLoop`` by name, otherwise 'baseline' (also at a ratio of 0), 'merging',
    'caching' or 'merging and caching'. Validation during training and images of ``ToMeEvalHook``
    are left out.

    After the run a table goes to the log, and its rows to ``profile.json`` in the log folder. On
    CUDA, times are those of events, without synchronization.

    Args:
        warm_up: First steps of each method that do not count. Default: 1.
        steps: Steps of each method that count at most. Default: 100.

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
        self._stack = ExitStack()

    def before_run(self, runner) -> None:
        model = model_of(runner, "ToMeProfileHook")
        for module in model.modules():
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
                raise ToMeError(
                    f"ToMeProfileHook cannot observe the compiled {type(module).__name__}; "
                    "profile without torch.compile"
                )
        if self.recorder is not None:  # of a run that failed
            self.recorder.close()
        self.recorder = Recorder(model, self.warm_up, self.steps)

    def before_val(self, runner) -> None:
        if iteration_of(runner):  # during training
            self._stack.enter_context(running(""))

    def after_val(self, runner) -> None:
        self._stack.close()

    def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode="train") -> None:
        if self.recorder.full:
            self.recorder.close()

    def after_run(self, runner) -> None:
        self.recorder.close()
        frame = self.recorder.frame()
        if frame.empty:
            runner.logger.warning("ToMeProfileHook: after the warm-up there was no step")
            return
        table = frame.pivot(index="module", columns="method", values="ms")
        table = table.loc[frame["module"].unique(), frame["method"].unique()].rename_axis(None)
        text = table.to_string(float_format="{:.3f}".format, na_rep="-")
        runner.logger.info(f"profile: median milliseconds in a step\n{text}")
        if is_main_process():
            file = Path(runner.log_dir, "profile.json")
            frame.to_json(file, orient="records", indent=1)


class Recorder:
    """Marks on a network, its transformer blocks and their targets.

    Args:
        model: Whatever ``apply_tome`` takes.
        warm_up, steps: See :class:`ToMeProfileHook`.
    """

    def __init__(self, model: nn.Module, warm_up: int = 1, steps: int = 100) -> None:
        self.model = model
        self.first, self.last = warm_up, warm_up + steps - 1
        self._steps: Counter[str] = Counter()  # method -> steps so far
        self._stack = ExitStack()
        # (name of a module, its marks, (method, step) of each of its calls)
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
        method = label_of(self.model)
        calls.append((method, self._steps[method]))
        if name == STEP:
            self._steps[method] += 1

    @property
    def full(self) -> bool:
        """Whether enough steps of every method so far are measured."""
        counts = [count for method, count in self._steps.items() if method]
        return bool(counts) and min(counts) > self.last

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
        calls = calls[calls["step"].between(self.first, self.last) & (calls["method"] != "")]
        # A target of several modules, or a block that runs twice, is one row.
        steps = calls.groupby(["module", "method", "step"], sort=False)["ms"].sum()
        groups = steps.groupby(["module", "method"], sort=False)
        return groups.agg(ms="median", steps="count").reset_index()

    def close(self) -> None:
        """Take the marks away again."""
        self._stack.close()
