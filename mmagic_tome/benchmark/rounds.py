# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The interleaved rounds of one case: what slows the machine slows all contenders."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import ToMeError
from ..meters import Clock, peak_memory
from .attention import backend, set_processor
from .contenders import prepare, share_weights
from .denoisers import denoising_run
from .kinds import DENSE
from .targets import Target


@dataclass(frozen=True)
class Case:
    """One setting of everything that is not the contenders' business.

    Attributes:
        size (tuple): (height, width) in pixels.
        batch (int): of the network.
        dtype (str): ``'fp32'``, ``'bf16'``, ``'fp16'``, or ``'config'`` for the config's own.
        attention (str): of :data:`.attention.ATTENTIONS`.
        mode (str): ``'eager'`` or ``'compiled'``.
        steps (int): forwards of one measurement, at falling timesteps. Default 1.
    """

    size: tuple[int, int]
    batch: int
    dtype: str
    attention: str
    mode: str
    steps: int = 1

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{height}x{width}, batch {self.batch}, {self.dtype}, {self.attention} attention, "
            f"{self.mode}" + (f", {self.steps} steps" if self.steps > 1 else "")
        )


def run_case(
    target: Target,
    case: Case,
    wanted: list[str],
    config: Any,
    own: Mapping[str, Any],
    rounds: int,
    device: str,
    clock: str = "wall",
    memory: bool = True,
    until: float | None = None,
) -> dict[str, Any]:
    """Measure one case.

    Args:
        target: the network; it is not changed.
        case: the setting; its dtype is the target's already.
        wanted, config, own: see :func:`.contenders.prepare`.
        rounds: how often everybody runs, after a first time that is not counted.
        device: where the target is.
        clock: ``'wall'`` or ``'cpu'``.
        memory: whether to measure memory, in one more forward of everybody.
        until: time (``time.monotonic()``) by which to be done, if three rounds can be: later ones
            and then the memory are left out. None, the default: no limit.

    Returns:
        dict: ``results``: for each contender ``seconds`` (one per round), ``peak_bytes`` and
        ``peak_in`` (operator at the peak), ``relative_rmse_to_dense``, ``config``, ``ideal``,
        ``sites``; ``missing``: who did not take part and why; ``parameters``; ``counts``: what an
        entry of the batch is called in a figure per second, or None; ``steps``: of one run.

    Raises:
        ToMeError: the dense network itself does not run like this.
    """
    network = share_weights(target.network)
    set_processor(network, case.attention)
    call = target.call(case.size, case.batch)
    if case.steps > 1:
        call = denoising_run(call, case.steps)
    timer = Clock(device, clock)

    with torch.inference_mode(), backend(case.attention):
        try:
            reference = call(network).float().cpu()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ToMeError(f"the dense network does not run with {case}: {reason}") from error
        if not torch.isfinite(reference).all():
            raise ToMeError(f"the dense network gives NaN or infinity with {case}")
        contenders, missing = prepare(wanted, network, target.merging, config, own, call)
        results = {
            one.name: dict(
                kind=one.kind,
                config=one.config and one.config.to_dict(),
                ideal=one.ideal,
                sites=one.sites,
                seconds=[],
                relative_rmse_to_dense=_relative_error(one.output, reference),
            )
            for one in contenders
        }
        runners = {one.name: _runner(one.network, case.mode) for one in contenders}
        _drop_idle(runners, results, missing)
        # Everybody ran once by now; what is compiled did not.
        first = 0 if case.mode == "compiled" else 1
        count = (rounds + 1 - first + memory) * len(runners)
        longest = 0.0
        slow = 0.1 if sys.stderr.isatty() else 10.0
        bars = tqdm(total=count, dynamic_ncols=True, leave=False, mininterval=slow)
        with _frozen_garbage(), bars as bar:
            for turn in range(first, rounds + 1):
                started = time.monotonic()
                # Memory takes about as long as a round.
                if turn > 3 and until and started + (1 + memory) * longest > until:
                    break
                for name in balanced_order(list(runners), turn):
                    bar.set_description(f"{f'round {turn}' if turn else 'warm-up'}: {name}", False)
                    try:
                        seconds, out = timer(lambda name=name: call(runners[name]))
                    except Exception as error:
                        if turn or name == DENSE:
                            raise
                        # It ran eagerly: this is the compiler's complaint.
                        missing[name] = f"{case.mode}: {' '.join(str(error).split())[:250]}"
                        del runners[name]
                        continue
                    if turn:
                        results[name]["seconds"].append(seconds)
                    else:
                        results[name]["relative_rmse_to_dense"] = _relative_error(out, reference)
                    del out
                    bar.update()
                if not turn:
                    _drop_idle(runners, results, missing)
                longest = max(longest, time.monotonic() - started)
            in_time = not until or time.monotonic() < until
            for name in runners if memory and in_time else ():
                bar.set_description(f"memory: {name}", False)
                peak, operator = peak_memory(lambda name=name: call(runners[name]), device)
                results[name].update(peak_bytes=peak, peak_in=operator)
                bar.update()
    return dict(
        results={name: results[name] for name in runners},
        missing=missing,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        counts=target.counts,
        steps=case.steps,
    )


def balanced_order(names: Sequence[str], turn: int) -> list[str]:
    """Who runs after whom in a round: nobody always after the same one.

    What runs before leaves its mark on caches, on the heap and on the processor's clock. A rotated
    order would give everybody one predecessor in all rounds, and charge them with its mark. Here
    everybody runs after every other within a round equally often over n rounds (2 n where n is
    odd), and equally often at every place of a round (Williams, Experimental designs balanced for
    the estimation of residual effects of treatments, 1949).

    Args:
        names: n contenders.
        turn (int): number of the round.
    """
    count = len(names)
    # 0, 1, n-1, 2, n-2, ...: neighbours differ by every number once.
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    order = [names[(step + turn) % count] for step in zigzag]
    # With an odd count each difference comes from one side only; the mirror image has the other.
    return order[::-1] if count % 2 and turn // count % 2 else order


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Clocks collect garbage before they start: they need not look at all that is here to stay."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _runner(network: nn.Module, mode: str) -> nn.Module:
    if mode == "eager":
        return network
    import torch._dynamo.config as dynamo

    # All contenders are versions of the same code, and each has guards of its own.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(dynamo, name):
            setattr(dynamo, name, max(64, getattr(dynamo, name)))
    return torch.compile(network)


def _drop_idle(runners: dict, results: dict, missing: dict[str, str]) -> None:
    """Who changed nothing did not merge: its time would mean nothing."""
    for name in list(runners):
        error = results[name]["relative_rmse_to_dense"]
        if name != DENSE and error == 0:
            missing[name] = "its output is the dense one bit for bit: it merged nothing"
        elif error != error:
            missing[name] = "its output has NaN"
        else:
            continue
        del runners[name]


def _relative_error(out: torch.Tensor | None, reference: torch.Tensor) -> float:
    """How far an output is from dense; None is dense itself."""
    if out is None:
        return 0.0
    difference = (out.float().cpu() - reference).pow(2).mean().sqrt()
    # An output without any spread (the zeros of fresh weights) has nothing to be relative to.
    return 0.0 if difference == 0 else (difference / reference.std()).item()
