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
from ..cache import StepCacheConfig
from ..cache.skip import skips_of_run
from ..config import ToMeConfig
from ..errors import ToMeError
from ..models import find_adapter
from ..settings import Setting
from .predict import Costs
from .space import PLAN_INTERVAL, RATIOS, Space

ROUNDS = 3
# However long they take: what one round says of merging may be what another program did.
LEAST_ROUNDS = 2
# Few steps give every kind of call a few times.
STEPS = 8
WARM_UP_STEPS = 2
TARGETS = ("attn", "attn_kv", "block")
# The ratio that saves most: where it saves nothing, no other does.
MOST = max(RATIOS)
# Merging that saves less of a call than this is not used: it costs quality, and the clock is no
# better than that.
LEAST_SAVING = 0.02


def measure_costs(
    generator: Generator,
    numbers: Sequence[int],
    regions: Sequence[str],
    order: int,
    seconds: float,
    rounds: dict[str, list] | None = None,
    keep: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure what there is to choose from.

    Args:
        generator: of a model that is dense.
        numbers: the pictures of a run.
        regions: of 'network' and 'inner', what may be skipped.
        order: of extrapolation.
        seconds: after which no further round begins; two are always measured.
        rounds: of an earlier call with the same arguments that was broken off, JSON-able, {} at
            first; it grows by every round, so that none is measured twice.
        keep: called after every round, such as to write ``rounds`` to a file.

    Returns:
        JSON-able: ``network_skipped``, ``inner_skipped`` (None where they were not measured),
        ``rest``, ``merges`` (a list of [target, level, ratio, what it adds]), ``prop_attn``
        (targets with proportional attention), ``inner_levels``, ``dense_call_seconds``,
        ``rounds`` (of the first measurement).
    """
    adapter, network = find_adapter(generator.model)
    blocks = adapter.blocks(network)
    levels = sorted({block.downsample for block in blocks})
    runs = {"dense": Setting()}
    for region in regions:
        # Everywhere, to see as many as possible in a short run.
        cache = StepCacheConfig(region=region, timestep_range=(0.0, 1.0), order=order)
        runs[region] = Setting(cache=(cache,))
    merges = {}
    for target in TARGETS:
        for level in levels:
            setting = _merging_that_works(generator.model, target, level)
            if setting is not None:
                merges[target, level, MOST] = setting
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
            (target, level, ratio): merging(
                target, level, ratio, merges[target, level, MOST].tome.prop_attn
            )
            for target, level, _ in kept
            for ratio in RATIOS
            if ratio != MOST
        }
        second = {}
        if more:
            more_runs = {"dense": Setting(), **more}
            second = _rounds(generator, numbers, more_runs, bar, until, held[1], keep)
    found = [[*key, _added(first, key)] for key in kept]
    found += [[*key, _added(second, key)] for key in more if _saves(second, key)]
    inner = _inside(adapter.inner_modules(network, 1), blocks) if "inner" in regions else set()
    inner = {
        level
        for level in levels
        if all(block.name in inner for block in blocks if block.downsample == level)
    }
    dense = first["dense"]
    return {
        "network_skipped": _share(first, "network", "network"),
        "inner_skipped": _share(first, "inner", "inner"),
        "rest": median(one["rest"] / one["full"] for one in dense),
        "merges": sorted(found),
        "prop_attn": sorted({key[0] for key in kept if merges[key].tome.prop_attn}),
        "inner_levels": sorted(inner),
        "dense_call_seconds": median(one["full"] for one in dense),
        "rounds": len(dense),
    }


def costs_of(measured: dict[str, Any]) -> Costs:
    """The figures of :func:`measure_costs`, for a predictor."""
    return Costs(
        network_skipped=measured["network_skipped"] or 0.0,
        inner_skipped=measured["inner_skipped"],
        rest=measured["rest"],
        merges={(where, level, ratio): added for where, level, ratio, added in measured["merges"]},
        inner_levels=frozenset(measured["inner_levels"]),
    )


def space_of(measured: dict[str, Any], order: int) -> Space:
    """What saves time here.

    Merging: of each level the ratios that save more than the ratio below.
    """
    costs = {region: measured[f"{region}_skipped"] for region in ("network", "inner")}
    usable = tuple(region for region, cost in costs.items() if cost is not None and cost < 1)
    tables: dict[str, dict[int, tuple[float, ...]]] = {}
    best: dict[tuple[str, int], float] = {}
    for target, level, ratio, added in sorted(measured["merges"]):
        if added < best.get((target, level), 0.0):
            best[target, level] = added
            table = tables.setdefault(target, {})
            table[level] = (*table.get(level, ()), ratio)
    return Space(usable, tables, order, tuple(measured["prop_attn"]))


def merging(target: str, level: int, ratio: float, prop_attn: bool) -> Setting:
    """Merging at one level, with a schedule as a candidate has it."""
    config = ToMeConfig(
        ratio={"downsample": {level: ratio}},
        targets=[target],
        max_downsample=level,
        plan_interval=PLAN_INTERVAL,
        prop_attn=prop_attn,
    )
    return Setting(config)


def _merging_that_works(model: Any, target: str, level: int) -> Setting | None:
    """Merging at one level, if a model can be merged there; with proportional attention if it
    can be."""
    for prop_attn in (True, False):
        try:
            setting = merging(target, level, MOST, prop_attn)
            with setting.apply(model):
                return setting
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
    setting: Setting,
    steps: int,
    on_step: Callable[[], object],
) -> dict[str, float]:
    """Mean seconds of a call by what is skipped at it, and ``rest``: all around the calls."""
    with setting.apply(generator.model):
        _, clock = generator.run(numbers, steps, on_step=on_step)
    seconds = generator.step_seconds
    skips = skips_of_run(setting.cache or (), len(seconds))
    by_kind: dict[str, list[float]] = {}
    # The first call of a run pays for what the machine had forgotten of the network.
    for number, (skipped, taken) in enumerate(zip(skips, seconds)):
        if number or len(seconds) == 1:
            by_kind.setdefault(min(skipped, default="full"), []).append(taken)
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
