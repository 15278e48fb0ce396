# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the parts of a network cost on this machine.

Short runs of the whole model, in rounds in which everything that is measured runs once: what slows
the machine for a while slows all of them. Every figure is a share of the dense network's in the
same round, and the median of the rounds counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from ..apis.text2image import Generator
from ..config import ToMeConfig
from ..errors import ToMeError
from ..evaluation.contenders import Contender
from ..models import find_adapter
from .predict import Costs, left_out
from .sampler import Trace
from .space import RATIOS, REFRESH, Space

ROUNDS = 3
# However long they take: what one round says of merging may be what another program did.
LEAST_ROUNDS = 2
# Few steps give every kind of call a few times.
STEPS = 8
WARM_UP_STEPS = 2
SITES = ("attn", "attn_kv", "block")
# The ratio that saves most: where it saves nothing, no other does.
MOST = max(RATIOS)
# Merging that saves less of a call than this is left out: it costs quality, and the clock is no
# better than that.
LEAST_SAVING = 0.02


def measure_costs(
    generator: Generator,
    numbers: Sequence[int],
    scopes: Sequence[str],
    order: int,
    seconds: float,
    rounds: dict[str, list] | None = None,
    keep: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure what there is to choose from.

    Args:
        generator: of a model that is dense.
        numbers: the pictures of a run.
        scopes: of 'network' and 'deep', what may be left out.
        order: of foretelling.
        seconds: after which no further round begins; two are always measured.
        rounds: of an earlier call with the same arguments that was broken off, JSON-able, {} at
            first; it grows by every round, so that none is measured twice.
        keep: called after every round, such as to write ``rounds`` to a file.

    Returns:
        JSON-able: ``foretold``, ``shallow`` (None where they were not measured), ``rest``,
        ``merges`` (a list of [site, level, ratio, what it adds]), ``proportional`` (sites where
        attention is told what its keys stand for), ``deep_levels``,
        ``dense_call_seconds``, ``rounds`` (of the first measurement).
    """
    adapter, network = find_adapter(generator.model)
    blocks = adapter.blocks(network)
    levels = sorted({block.downsample for block in blocks})
    runs = {"dense": None}
    for scope in scopes:
        # Everywhere, to see as many as possible in a short run.
        reuse = {scope: dict(steps=2, between=(0.0, 1.0), order=order)}
        runs[scope] = ToMeConfig(ratio=0, reuse=reuse)
    merges = {}
    for site in SITES:
        for level in levels:
            config = _merging_that_works(generator.model, site, level)
            if config is not None:
                merges[site, level, MOST] = config
    until = time.perf_counter() + seconds
    rounds = {} if rounds is None else rounds
    held = [rounds.setdefault(name, []) for name in ("first", "second")]
    with tqdm(desc="measuring costs", unit="step", dynamic_ncols=True) as bar:
        runs |= merges
        if _of_others(held[0], runs):
            held[1].clear()
        elif held[1]:
            until = 0.0  # the first ones are done
        first = _rounds(generator, numbers, runs, bar, until, held[0], keep)
        kept = [key for key in merges if _saves(first, key)]
        more = {
            (site, level, ratio): merging(
                site, level, ratio, merges[site, level, MOST].proportional
            )
            for site, level, _ in kept
            for ratio in RATIOS
            if ratio != MOST
        }
        second = {}
        if more:
            more_runs = {"dense": None, **more}
            second = _rounds(generator, numbers, more_runs, bar, until, held[1], keep)
    found = [[*key, _added(first, key)] for key in kept]
    found += [[*key, _added(second, key)] for key in more if _saves(second, key)]
    deep = _inside(adapter.inner_modules(network, 1), blocks) if "deep" in scopes else set()
    inner = {
        level
        for level in levels
        if all(block.name in deep for block in blocks if block.downsample == level)
    }
    dense = first["dense"]
    return {
        "foretold": _share(first, "network", "network"),
        "shallow": _share(first, "deep", "deep"),
        "rest": median(one["rest"] / one["full"] for one in dense),
        "merges": sorted(found),
        "proportional": sorted({key[0] for key in kept if merges[key].proportional}),
        "deep_levels": sorted(inner),
        "dense_call_seconds": median(one["full"] for one in dense),
        "rounds": len(dense),
    }


def costs_of(measured: dict[str, Any]) -> Costs:
    """The figures of :func:`measure_costs`, for a predictor."""
    return Costs(
        foretold=measured["foretold"] or 0.0,
        shallow=measured["shallow"],
        rest=measured["rest"],
        merges={(site, level, ratio): added for site, level, ratio, added in measured["merges"]},
        deep_levels=frozenset(measured["deep_levels"]),
    )


def space_of(measured: dict[str, Any], order: int) -> Space:
    """What saves time here.

    Merging: of each level the ratios that save more than the ratio below.
    """
    scopes = [("network", "foretold"), ("deep", "shallow")]
    usable = tuple(s for s, key in scopes if measured[key] is not None and measured[key] < 1)
    tables: dict[str, dict[int, tuple[float, ...]]] = {}
    best: dict[tuple[str, int], float] = {}
    for site, level, ratio, added in sorted(measured["merges"]):
        if added < best.get((site, level), 0.0):
            best[site, level] = added
            table = tables.setdefault(site, {})
            table[level] = (*table.get(level, ()), ratio)
    return Space(usable, tables, order, tuple(measured["proportional"]))


def merging(site: str, level: int, ratio: float, proportional: bool) -> ToMeConfig:
    """Merging at one level, with a schedule as a candidate has it."""
    return ToMeConfig(
        ratio={"level": {level: ratio}},
        sites=[site],
        max_downsample=level,
        refresh={"steps": REFRESH},
        proportional=proportional,
    )


def _merging_that_works(model: Any, site: str, level: int) -> ToMeConfig | None:
    """Merging at one level, if a model can be merged there; proportional if it can be."""
    for proportional in (True, False):
        try:
            config = merging(site, level, MOST, proportional)
            with Contender("", tome_cfg=config).on(model):
                return config
        except ToMeError:
            continue
    return None


def _rounds(generator, numbers, runs, bar, until, rounds, keep) -> dict[Any, list[dict]]:
    """Figures of every run in every round, after short runs to warm up; adds to ``rounds``."""
    names = {key: _name(key) for key in runs}
    if _of_others(rounds, runs):
        rounds.clear()

    def enough() -> bool:
        least = len(rounds) >= LEAST_ROUNDS
        return len(rounds) >= ROUNDS or (least and time.perf_counter() > until)

    steps = min(STEPS, generator.request.steps)
    warm_up = min(WARM_UP_STEPS, steps)
    if not enough():
        bar.total = bar.n + len(runs) * (warm_up + steps * (ROUNDS - len(rounds)))
        for key in runs:
            bar.set_postfix_str("warm-up")
            _run(generator, numbers, runs[key], warm_up, bar.update)
    while not enough():
        found = {}
        for key in list(runs)[:: -1 if len(rounds) % 2 else 1]:
            bar.set_postfix_str(names[key])
            found[names[key]] = _run(generator, numbers, runs[key], steps, bar.update)
        rounds.append(found)
        keep()
    return {key: [one[name] for one in rounds] for key, name in names.items()}


def _of_others(rounds, runs) -> bool:
    """Whether rounds are not of these runs, but what other code left."""
    return any(one.keys() != set(map(_name, runs)) for one in rounds)


def _run(
    generator: Generator,
    numbers: Sequence[int],
    config: ToMeConfig | None,
    steps: int,
    on_step: Callable[[], object],
) -> dict[str, float]:
    """Mean seconds of a call by what is left out at it, and ``rest``: all around the calls."""
    model = generator.model
    with Contender("", tome_cfg=config).on(model), Trace(model) as trace:
        _, clock = generator.run(numbers, steps, on_step=on_step)
    seconds = generator.step_seconds
    out = left_out(config or ToMeConfig(ratio=0), trace.times, trace.levels)
    by_kind: dict[str, list[float]] = {}
    # The first call of a run pays for what the machine had forgotten of the network.
    for number, (kind, taken) in enumerate(zip(out, seconds)):
        if number or len(seconds) == 1:
            by_kind.setdefault(min(kind, default="full"), []).append(taken)
    return {"rest": clock.total - clock.unet, **{k: mean(v) for k, v in by_kind.items()}}


def _shares(found, key, kind) -> list[float]:
    """Seconds of a kind of call as a share of the dense ones of the same round."""
    return [
        one[kind] / dense["full"]
        for dense, one in zip(found["dense"], found.get(key, []))
        if kind in one
    ]


def _share(found, key, kind) -> float | None:
    shares = _shares(found, key, kind)
    return median(shares) if shares else None


def _saves(found, key) -> bool:
    """Whether merging saved time in every round: a busy machine makes up savings that are none."""
    return all(share < 1 - LEAST_SAVING for share in _shares(found, key, "full"))


def _added(found, key) -> float:
    return _share(found, key, "full") - 1


def _inside(modules, blocks) -> set[str]:
    """Names of the blocks that are somewhere in some modules."""
    held = {id(inner) for module in modules for inner in module.modules()}
    return {block.name for block in blocks if id(block.module) in held}


def _name(key: Any) -> str:
    return key if isinstance(key, str) else "merge {} at {}: {}".format(*key)
