"""Runs one stage of training: schedule, EMA, checkpoints, log."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import common
import torch
from common import ToolError, save_json, write_atomically
from tqdm import tqdm

LONGEST_STEP = 60.0  # seconds; what a step takes beyond this is a pause


@dataclass
class State:
    """What a checkpoint holds besides the weights."""

    step: int = 0
    seconds: float = 0.0
    losses: list = field(default_factory=list)  # [step, seconds, mean loss]


class LossLog:
    """Losses by image size as JSON lines, appended while the training runs.

    On resuming, `rewind` removes the lines of the steps that are repeated.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[tuple[int, float], list[tuple[float, float]]] = {}

    def rewind(self, step: int) -> None:
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step
            ]
            write_atomically(self.path, lambda p: p.write_text("".join(kept), encoding="utf-8"))

    def add(self, size: int, merge: float, loss: float, seconds: float) -> None:
        self._open.setdefault((size, merge), []).append((loss, seconds))

    def write(self, **common_fields) -> None:
        """One line for every image size and merge ratio since the last call."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for (size, merge), values in sorted(self._open.items()):
                losses, seconds = zip(*values)
                line = {
                    **common_fields,
                    "size": size,
                    "merge": merge,
                    "steps": len(values),
                    "loss": round(sum(losses) / len(losses), 5),
                    "step_seconds": round(sum(seconds) / len(seconds), 3),
                }
                file.write(json.dumps(line) + "\n")
        self._open.clear()


class Trainer:
    """Runs one stage: schedule, EMA, checkpoints, log.

    `loss_fn(generator, step, part, parts)` is all that differs between stages. The generator is
    seeded by (seed, step, part), so a resumed run sees the same random numbers.

    With `workers=2` a second process shares the weights and both take parts of the batch from one
    queue. On a CPU that others use too this is far faster than two threads in one process, where
    every operation waits for the slower thread.

    On SIGTERM the run finishes its step, writes a checkpoint and raises KeyboardInterrupt.
    """

    def __init__(
        self, stage, modules, loss_fn, work_dir, device, checkpoint_minutes=5.0, seed=0, workers=1
    ):
        self.stage, self.modules, self.loss_fn = stage, modules, loss_fn
        self.device = torch.device(device)
        self.folder = Path(work_dir)
        self.path = self.folder / "checkpoints" / f"{stage.name}.pt"
        self.checkpoint_minutes = checkpoint_minutes
        self.seed = seed
        self.parts = math.ceil(stage.batch / stage.micro) if stage.micro else 1
        self.workers = min(workers, self.parts) if self.device.type == "cpu" else 1
        self.state = State()
        common.repair_torchvision()
        from diffusers.training_utils import EMAModel

        if self.workers > 1:
            for module in modules.values():
                module.share_memory()
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.ema = EMAModel(self.parameters, decay=stage.ema, foreach=True)
        self._helpers = []
        self._log = LossLog(self.folder / "logs" / f"{stage.name}.jsonl")
        self._terminated = False

    def save(self) -> None:
        checkpoint = {
            "state": asdict(self.state),
            "stage": asdict(self.stage),
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        write_atomically(self.path, lambda p: torch.save(checkpoint, p))
        save_json(
            self.folder / "logs" / f"{self.stage.name}.json",
            {"stage": asdict(self.stage), **asdict(self.state)},
        )

    def resume(self) -> bool:
        if not self.path.is_file():
            return False
        checkpoint = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(checkpoint["modules"][name])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.ema.to(self.device)
        self.state = State(**checkpoint["state"])
        self._log.rewind(self.state.step)
        return True

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the modules hold the averaged weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @property
    def finished(self) -> bool:
        return self.stage.progress(self.state.step, self.state.seconds) >= 1

    # ---- the parts of one batch, shared between processes

    def _take_parts(self, step: int, next_part) -> float:
        total = 0.0
        while (part := next_part()) < self.parts:
            generator = torch.Generator()
            generator.manual_seed((self.seed * 1_000_003 + step) * 64 + part)
            loss = self.loss_fn(generator, step, part, self.parts) / self.parts
            loss.backward()
            total += loss.item()
        return total

    def _start_helpers(self) -> None:
        import torch.multiprocessing as mp

        context = mp.get_context("fork")  # the helpers inherit models and data as they are
        size = sum(p.numel() for p in self.parameters)
        self._counter = context.Value("l", 0)
        self._step = context.Value("l", 0)
        self._begin = context.Barrier(self.workers)
        self._end = context.Barrier(self.workers)
        self._gradients = [torch.zeros(size).share_memory_() for _ in range(self.workers - 1)]
        self._losses = torch.zeros(self.workers - 1).share_memory_()
        for i in range(self.workers - 1):
            process = context.Process(target=self._help, args=(i,), daemon=True)
            process.start()
            self._helpers.append(process)

    def _next_part(self) -> int:
        with self._counter.get_lock():
            self._counter.value += 1
            return self._counter.value - 1

    def _help(self, index: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        flat = self._gradients[index]
        with contextlib.suppress(threading.BrokenBarrierError):
            while True:
                self._begin.wait()
                if self._step.value < 0:
                    return
                self._losses[index] = self._take_parts(self._step.value, self._next_part)
                offset = 0
                for p in self.parameters:
                    view = flat[offset : offset + p.numel()]
                    if p.grad is None:
                        view.zero_()
                    else:
                        # In the order of the memory, which parameter and gradient may not share.
                        view.view(p.shape).copy_(p.grad)
                    p.grad = None
                    offset += p.numel()
                self._end.wait()

    def _stop_helpers(self) -> None:
        if self._helpers:
            self._step.value = -1
            with contextlib.suppress(Exception):
                self._begin.wait(timeout=60)
            for process in self._helpers:
                process.join(timeout=10)
            self._helpers = []

    def _loss_and_gradients(self) -> float:
        step = self.state.step
        if not self._helpers:
            parts = iter(range(self.parts + 1))
            return self._take_parts(step, lambda: next(parts))
        self._step.value, self._counter.value = step, 0
        self._begin.wait()
        loss = self._take_parts(step, self._next_part)
        self._end.wait(timeout=600)
        for flat in self._gradients:
            offset = 0
            for p in self.parameters:
                gradient = flat[offset : offset + p.numel()].view(p.shape)
                p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)
                offset += p.numel()
        return loss + self._losses.sum().item()

    @contextlib.contextmanager
    def _sigterm_noted(self):
        def note(*_):
            self._terminated = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def run(
        self, on_checkpoint=None, max_steps: int | None = None, sheet_minutes: float = 0.0
    ) -> None:
        with self._sigterm_noted():
            self._run(on_checkpoint, max_steps, sheet_minutes)
        if self._terminated:
            raise KeyboardInterrupt

    def _run(self, on_checkpoint, max_steps: int | None, sheet_minutes: float) -> None:
        stage, state = self.stage, self.state
        bar = tqdm(total=stage.steps or None, initial=state.step, desc=stage.name, mininterval=10)
        last_save = last_sheet = time.monotonic()
        sheet_seconds = 0.0
        recent: list[float] = []
        done = 0
        if self.workers > 1:
            self._start_helpers()
        try:
            while not (
                self.finished or self._terminated or (max_steps is not None and done >= max_steps)
            ):
                began = time.monotonic()
                for group in self.optimizer.param_groups:
                    group["lr"] = stage.learning_rate(state.step, state.seconds)
                loss = self._loss_and_gradients()
                if not math.isfinite(loss):
                    raise ToolError(f"{stage.name}: the loss became {loss} at step {state.step}")
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                # Early on, the average is over the few steps there are.
                self.ema.decay = min(stage.ema, (state.step + 1) / (state.step + 10))
                self.ema.step(self.parameters)
                state.step += 1
                done += 1
                # A process that was stopped for a while did not train for that while.
                seconds = min(time.monotonic() - began, LONGEST_STEP)
                state.seconds += seconds
                recent.append(loss)
                self._log.add(*stage.draw(state.step - 1, self.seed), loss, seconds)
                bar.update()
                if len(recent) == 20 or self.finished:
                    mean = sum(recent) / len(recent)
                    state.losses.append([state.step, round(state.seconds, 1), round(mean, 6)])
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    recent.clear()
                    self._log.write(
                        step=state.step,
                        seconds=round(state.seconds),
                        time=time.strftime("%Y-%m-%dT%H:%M:%S"),
                        lr=self.optimizer.param_groups[0]["lr"],
                    )
                if time.monotonic() - last_save > 60 * self.checkpoint_minutes:
                    self.save()
                    last_save = time.monotonic()
                    # Sample sheets take a tenth of the time at most.
                    pause = max(10 * sheet_seconds, 60 * sheet_minutes)
                    if on_checkpoint and last_save - last_sheet > pause:
                        with self.averaged():
                            on_checkpoint(self)
                        last_sheet = time.monotonic()
                        sheet_seconds = last_sheet - last_save
        finally:
            self._stop_helpers()
            bar.close()
        self.save()
        if on_checkpoint and not self._terminated:
            with self.averaged():
                on_checkpoint(self)


def load_averaged(checkpoint: Path, *modules) -> None:
    """Put the averaged weights of a checkpoint into modules that were built anew."""
    from diffusers.training_utils import EMAModel

    if not checkpoint.is_file():
        raise ToolError(f"{checkpoint} is not there: run its stage first")
    parameters = [p for m in modules for p in m.parameters()]
    ema = EMAModel(parameters)
    ema.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"])
    ema.copy_to(parameters)
