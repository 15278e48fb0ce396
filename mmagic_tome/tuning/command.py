# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the ``tune`` command does: costs, dense pictures, search, check, config, in this order.

Each stage looks at the folder for what is done already, so every run of the command is a
continuation, a first one of an empty folder.
"""

from __future__ import annotations

import math
import socket
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..apis.infer import environment, make_request, quiet_libraries
from ..apis.model_config import (
    build_model,
    check_config,
    check_device,
    inner_model,
    load_config,
    setting_config,
)
from ..apis.text2image import Generator, Request
from ..apply import remove_cache, remove_tome
from ..cache import PRESETS
from ..errors import ToMeError
from ..evaluation.generate import PictureRequest, fingerprint, too_long
from ..evaluation.prompts import Prompt, load_prompts
from ..models import find_adapter
from ..schedulers import scheduler_name
from ..version import __version__
from .check import check
from .costs import costs_of, measure_costs, space_of
from .folder import SearchFolder
from .judge import Judge
from .plot import write_plot
from .predict import Predictor
from .sampler import adds_noise
from .search import MARGIN, Goal, Search, Trial, front, psnr_of
from .space import Candidate, Space, candidate_of
from .write import base_of, config_text, write_text

# Dense with these shares of the steps, to compare with.
FEWER_STEPS = (0.8, 0.65, 0.5)
# How often the search's best is checked, each time with a higher goal than before.
ATTEMPTS = 3
# At most this share of the budget is for the measurement of costs, but for two rounds.
COSTS_SHARE = 0.25
# At least this share is for the search itself, however long the rest took.
LEAST_SHARE = 0.5
ROWS = 8


@dataclass
class Found:
    """What came out of a search.

    Args:
        trial: the chosen one.
        checked: of :func:`~.check.check`.
        search: with all trials.
        others: (name, speed-up, PSNR) of presets and fewer steps.
        notes: what a user should know, one sentence each.
    """

    trial: Trial
    checked: dict[str, Any]
    search: Search
    others: list[tuple[str, float, float]]
    notes: list[str]


def command(args: Namespace, argv: Sequence[str]) -> None:
    """Do what the ``tune`` command was asked to; see ``cli.py`` for ``args``.

    Raises:
        ToMeError: for input that cannot work, before a model is loaded wherever that can be
            told without one.
    """
    device = check_device(args.device)
    config = load_config(args.config_path, args.cfg_options)
    _check_spelling(config)
    notes: list[str] = []
    request = _request(args, config, notes)
    check_config(config, request, None, compare=False)

    quiet_libraries()
    folder = SearchFolder(args.folder)
    with folder.locked():
        print(f"building {inner_model(config).type} of {args.config} on {device}")
        model = build_model(config, device, args.dtype)
        # What is found takes the place of the config's own.
        remove_tome(model)
        remove_cache(model)
        generator = Generator(model, request)
        if too_long(generator):
            notes.append("some prompts are longer than the model reads; it cuts them")
        folder.open(_basis(generator, device, args.search_prompts), {}, args.overwrite)
        found = _search(args, generator, device, folder, notes)
        _report(args, argv, config, generator, device, folder, found)


# --- input ----------------------------------------------------------------------------------------


def _check_spelling(config) -> None:
    """Fail where keys at the top of the written config would contradict others."""
    setting_config(config)
    model = config.model
    while isinstance(model, dict):
        for key in ("tome_cfg", "tomesd_cfg", "cache_cfg"):
            if model.get(key) is not None:
                raise ToMeError(
                    f"the config has {key} inside model=dict(type={model.get('type')!r}), where "
                    "the written config could not replace it; move it to the top as "
                    f"{'cache_cfg' if key == 'cache_cfg' else 'tome_cfg'}, or take it out"
                )
        model = model.get("model")


def _request(args, config, notes) -> PictureRequest:
    """The request, with the prompts of the search first; sets ``args.prompt_source``."""
    values = {**vars(args), "prompts": ["checked below"]}
    plain = make_request(Namespace(**values), config)
    args.prompt_source, pictures = _prompts(args, config, plain, notes)
    plain.prompts = [picture.text for picture in pictures]
    return PictureRequest(**vars(plain), pictures=pictures)


def _prompts(args, config, plain: Request, notes) -> tuple[str, list[Prompt]]:
    """Where the prompts come from, and as many as are needed, those of the search first."""
    wanted = args.search_prompts + args.unseen_prompts
    given = args.prompts or args.prompt_set or _prompts_of(config, args.config_path.parent, wanted)
    if given is None:
        given = "demo"
        notes.append(
            "no prompts were given: these are captions of the demo model; pass --prompts FILE "
            "with prompts like those that you will use"
        )
    found = load_prompts(given, limit=wanted, seed=plain.seed, negative=plain.negative_prompt)
    count = len(found.prompts)
    if count < wanted:
        raise ToMeError(
            f"prompts of {found.source}: there are {count}, and --search-prompts "
            f"{args.search_prompts} plus --unseen-prompts {args.unseen_prompts} are {wanted}; "
            + (
                f"write --search-prompts {max(1, count // 3)} --unseen-prompts "
                f"{count - max(1, count // 3)}"
                if count > 1
                else "write more prompts"
            )
        )
    # Both parts evenly spread over the list.
    first = {i * wanted // args.search_prompts for i in range(args.search_prompts)}
    order = [*sorted(first), *(i for i in range(wanted) if i not in first)]
    return found.source, [found.prompts[i] for i in order]


def _prompts_of(config, folder: Path, wanted: int) -> Any:
    """What a config says of prompts, as ``load_prompts`` takes it; None if that is too little."""
    evaluation = config.get("evaluation")
    if isinstance(evaluation, dict):
        given = evaluation.get("prompts")
        if isinstance(given, str):
            return str(folder / Path(given).expanduser())
        if given or evaluation.get("prompt_set"):
            return list(given) if given else evaluation["prompt_set"]
    own = (config.get("infer_cfg") or {}).get("prompts") or []
    return list(own) if not isinstance(own, str) and len(own) >= wanted else None


# --- search ---------------------------------------------------------------------------------------


def _basis(generator, device, search_prompts: int) -> dict[str, Any]:
    """What everything in the folder depends on, but for the clock's part: see :func:`_place`."""
    return {
        **fingerprint(generator, device),
        "mmagic_tome": __version__,
        "search_prompts": search_prompts,
    }


def _place(device) -> dict[str, Any]:
    """What times depend on: those of another place say nothing of this one."""
    where = environment(device)
    place = {key: where[key] for key in ("processor", "cpus", "gpu")}
    return {**place, "host": socket.gethostname(), "threads": torch.get_num_threads()}


def _search(args, generator, device, folder, notes) -> Found:
    goal = Goal(args.speedup, args.psnr)
    numbers = range(args.search_prompts)
    regions, order = _regions(generator, notes)
    budget = 60 * args.budget
    limit = COSTS_SHARE * budget
    place = _place(device)
    measured = _costs(generator, device, folder, numbers, regions, order, limit, place, notes)
    judge = Judge(generator, numbers, folder)
    trace = judge.make_dense()
    space = space_of(measured, order)
    predictor = Predictor(costs_of(measured), len(trace["times"]))
    space = _useful(space, predictor, generator.request.steps, notes)

    spent = measured["seconds"]
    search = Search(space, predictor.speedup, lambda one: (0.0, 0.0), 0.0)
    search.check_reachable(goal)
    others, seconds = _fewer_steps(judge, predictor, generator.request.steps)
    presets = {name: candidate_of({"cache": name}) for name in PRESETS}
    starts = {name: one for name, one in presets.items() if one is not None and space.holds(one)}

    with tqdm(total=budget, desc="searching", unit="s", dynamic_ncols=True, bar_format=_BAR) as bar:
        bar.update(min(spent + seconds, budget))

        def tried(candidate: Candidate) -> tuple[float, float]:
            bar.set_postfix_str(f"{len(search.trials) + 1}: {candidate.text()}")
            trial = judge.trial(candidate.options())
            # Beyond its end a bar has no shape.
            bar.update(min(trial["seconds"], max(bar.total - bar.n, 0)))
            return trial["mse"], trial["seconds"]

        left = max(budget - spent - seconds, LEAST_SHARE * budget)
        search = Search(space, predictor.speedup, tried, left, starts.values())
        unseen = range(args.search_prompts, len(generator.request.prompts))
        trial, checked = _best(search, goal, judge, unseen, place, bar, notes)
    notes += _beaten_by(others, trial, goal)
    for name, candidate in starts.items():
        if candidate in search.trials:
            one = search.trials[candidate]
            others.append((f"preset {name}", one.speedup, one.psnr))
    return Found(trial, checked, search, others, notes)


_BAR = "{desc}: {percentage:3.0f}% of the budget|{bar}| {postfix}"


def _regions(generator, notes) -> tuple[list[str], int]:
    """Regions that may be skipped with the model's scheduler, and the order of extrapolation."""
    model = generator.model
    adapter, network = find_adapter(model)
    inner = ["inner"] if adapter.inner_modules(network, 1) else []
    noise = adds_noise(model.test_scheduler, generator.request.steps)
    if noise is False:
        return ["network", *inner], 1
    name = scheduler_name(model.test_scheduler)
    why = "adds noise between the steps" if noise else "could not be looked into"
    notes.append(
        f"the scheduler {name} {why}, so the network is never skipped as a whole; a scheduler "
        "without noise, such as DDIM or DPM-Solver++, allows for more"
    )
    return inner, 0


def _costs(
    generator, device, folder, numbers, regions, order, limit, place, notes
) -> dict[str, Any]:
    """Measured costs; those of the folder where they were measured here, see :func:`_place`."""
    held = folder.kept("costs.json")
    if held and held["place"] == place:
        return held
    if held:
        changed = [
            f"{key} {held['place'].get(key)}, now {place[key]}"
            for key in place
            if held["place"].get(key) != place[key]
        ]
        notes.append(
            f"the folder's times are of another place ({'; '.join(changed)}): costs and the check "
            "were measured anew, errors of what was tried are kept"
        )
    rounds = folder.kept("rounds.json")
    if rounds.get("place") != place:
        rounds = {"place": place, "seconds": 0.0}
    before, start = rounds["seconds"], time.perf_counter()

    def keep() -> None:
        rounds["seconds"] = before + time.perf_counter() - start
        folder.keep("rounds.json", rounds)

    first = list(numbers)[: generator.request.batch_size]
    measured = measure_costs(generator, first, regions, order, limit - before, rounds, keep)
    measured.update(
        place=place,
        seconds=before + time.perf_counter() - start,
        load_average_1min=environment(device)["load_average_1min"],
    )
    folder.keep("costs.json", measured)
    return measured


def _useful(space: Space, predictor: Predictor, steps: int, notes) -> Space:
    """The space without regions that are never skipped in so few steps."""
    useful = []
    for region in space.regions:
        alone = Space((region,), order=space.order)
        if predictor.speedup(alone.fastest()[0]) > 1:
            useful.append(region)
        else:
            notes.append(f"{region}: nothing to skip in {steps} steps; more --steps allow it")
    return replace(space, regions=tuple(useful))


def _fewer_steps(judge, predictor, steps) -> tuple[list[tuple[str, float, float]], float]:
    """(name, speed-up, PSNR) of the dense model with fewer steps, and the seconds it took."""
    counts = sorted({max(1, round(steps * share)) for share in FEWER_STEPS} - {steps}, reverse=True)
    points, seconds = [], 0.0
    for count in tqdm(counts, desc="fewer steps", dynamic_ncols=True):
        trial = judge.trial(None, steps=count)
        seconds += trial["seconds"]
        speedup = predictor.fewer_steps(count / steps)
        points.append((f"{count} steps", speedup, psnr_of(trial["mse"])))
    return points, seconds


def _beaten_by(others: Sequence[tuple[str, float, float]], trial: Trial, goal: Goal) -> list[str]:
    """A note where fewer steps are as fast as asked for (else: as the chosen one), and nearer."""
    least = goal.speedup or trial.speedup
    better = [one for one in others if one[1] >= least and one[2] > trial.psnr]
    if not better:
        return []
    name, speedup, psnr = max(better, key=lambda one: one[2])
    return [
        f"the dense model with {name} is better on the search prompts: {speedup:.2f}x predicted, "
        f"{psnr:.1f} dB; use that, or raise --budget"
    ]


def _best(search, goal, judge, unseen, place, bar, notes) -> tuple[Trial, dict[str, Any]]:
    """The best candidate, and what it does on the prompts that the search did not see.

    Where it misses the goal there, the search goes on with a higher one: ``ATTEMPTS`` checks.
    """
    if goal.speedup is None:
        return _best_at_psnr(search, goal, judge, unseen, place, bar, notes)
    found: list[tuple[Trial, dict[str, Any]]] = []
    needed = min(goal.speedup * MARGIN, search.top)
    for _ in range(ATTEMPTS):
        try:
            trial = search.run(Goal(speedup=needed))
        except ToMeError:
            if not found:
                raise
            break
        bar.close()
        checked = check(judge, unseen, trial.candidate.options(), place)
        found.append((trial, checked))
        measured = checked["speedup"]["median"]
        if measured >= goal.speedup:
            return trial, checked
        notes.append(
            f"{trial.candidate.text()}: predicted {trial.speedup:.2f}x measures {measured:.2f}x on "
            f"the unseen prompts, below {goal.speedup:g}x"
        )
        needed = min(trial.speedup * goal.speedup / measured * 1.005, search.top)
        if needed <= trial.speedup:
            break  # there is nothing faster
    trial, checked = max(found, key=lambda one: one[1]["speedup"]["median"])
    notes.append(
        f"MISSED: {goal.speedup:g}x was not measured; this is the fastest of {len(found)} checked, "
        f"{checked['speedup']['median']:.2f}x. On a busy machine, try again when it is quiet"
    )
    return trial, checked


def _best_at_psnr(search, goal, judge, unseen, place, bar, notes) -> tuple[Trial, dict[str, Any]]:
    """As :func:`_best`."""
    found: list[tuple[Trial, dict[str, Any], float]] = []
    needed = goal.psnr
    for _ in range(ATTEMPTS):
        try:
            trial = search.run(Goal(psnr=needed))
        except ToMeError:
            if not found:
                raise
            break
        bar.close()
        checked = check(judge, unseen, trial.candidate.options(), place)
        psnr = math.inf if checked["psnr"] is None else checked["psnr"]
        found.append((trial, checked, psnr))
        if psnr >= goal.psnr or math.isinf(trial.psnr):
            break
        notes.append(
            f"{trial.candidate.text()}: {trial.psnr:.1f} dB on the search prompts are {psnr:.1f} "
            f"dB on the unseen ones, below {goal.psnr:g}"
        )
        needed = trial.psnr + goal.psnr - psnr
    trial, checked, psnr = max(found, key=lambda one: one[2])
    if psnr < goal.psnr:
        notes.append(
            f"MISSED: {goal.psnr:g} dB was not reached on the unseen prompts; this is the best of "
            f"{len(found)} checked, {psnr:.1f} dB. Write more --search-prompts, or a higher --psnr"
        )
    measured = checked["speedup"]["median"]
    if measured <= 1:
        notes.append(
            f"MISSED: {measured:.2f}x is no faster than dense, where {trial.speedup:.2f}x was "
            "predicted. On a busy machine, try again when it is quiet, in another --out"
        )
    elif measured < trial.speedup / MARGIN**2:
        notes.append(
            f"predicted {trial.speedup:.2f}x measures {measured:.2f}x: on a busy machine, try "
            "again when it is quiet, in another --out"
        )
    return trial, checked


# --- what comes out -------------------------------------------------------------------------------


def _report(args, argv, config, generator, device, folder, found: Found) -> None:
    where = environment(device)
    settings = _settings(args, generator, device)
    goal = Goal(args.speedup, args.psnr)
    text = config_text(
        base_of(args.config, args.target),
        found.trial.candidate.options(),
        _comment(args, settings, where, found),
        replaces=[key for key in ("tome_cfg", "cache_cfg") if config.get(key) is not None],
        imports=_imports(config),
        infer=_infer(args),
    )
    title = f"{args.config_path.stem}: {settings['steps']} steps, {settings['size']}, {device}"
    write_plot(
        folder.path / "pareto.png",
        title,
        list(found.search.trials.values()),
        found.others,
        goal,
        found.trial,
        found.checked,
    )
    folder.keep("result.json", _result(argv, args, settings, where, found))
    write_text(args.target, text)
    print(f"\n{_table(found)}\n")
    print(_said(found))
    for note in found.notes:
        print(f"note: {note}")
    print(f"config: {args.target}\npicture, table and everything tried: {folder.path}")


def _settings(args, generator, device) -> dict[str, Any]:
    request = generator.request
    height, width = generator.size
    return {
        "config": args.config,
        "cfg_options": list(args.cfg_options),
        "prompts": args.prompt_source,
        "search_prompts": args.search_prompts,
        "unseen_prompts": len(request.prompts) - args.search_prompts,
        "steps": request.steps,
        "guidance": request.guidance,
        "size": f"{height}x{width}",
        "batch_size": request.batch_size,
        "scheduler": scheduler_name(generator.model.test_scheduler),
        "dtype": str(next(generator.model.unet.parameters()).dtype).replace("torch.", ""),
        "device": str(device),
    }


def _imports(config) -> list[str] | None:
    """What the config imports if this package is not among it, else None."""
    imports = (config.get("custom_imports") or {}).get("imports") or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    return None if any(name.split(".")[0] == "mmagic_tome" for name in imports) else imports


def _infer(args) -> dict[str, Any]:
    """What was given on the command line and decides how fast and how near the options are."""
    keys = ("steps", "guidance", "size", "batch_size", "negative_prompt")
    return {key: getattr(args, key) for key in keys if getattr(args, key) is not None}


def _comment(args, settings, where, found: Found) -> list[str]:
    goal = Goal(args.speedup, args.psnr).text()
    versions = ", ".join(f"{name} {one}" for name, one in where["versions"].items())
    place = where["gpu"] or f"{where['processor']}, {where['cpus']} CPUs"
    notes = [
        f"Found by the tune command of mmagic_tome for {goal}: {settings['steps']} steps, "
        f"guidance {settings['guidance']:g}, {settings['size']}, batch size "
        f"{settings['batch_size']}, {settings['scheduler']}, {settings['dtype']}.",
        f"Search: {len(found.search.trials)} settings on {settings['search_prompts']} prompts "
        f"({settings['prompts']}).",
        _said(found),
        f"Machine: {place}, {where['torch_threads']} threads of torch, {where['platform']}; load "
        f"average of the last minute {where['load_average_1min']}.",
        f"Versions: {versions}.",
    ]
    if settings["cfg_options"]:
        notes.append(
            f"Measured with --cfg-options {' '.join(settings['cfg_options'])}: not in this config."
        )
    return [*notes, *(note for note in found.notes if note.startswith("MISSED"))]


def _said(found: Found) -> str:
    """What was predicted and measured of the chosen one, in a few sentences."""
    checked, factor = found.checked, found.checked["speedup"]
    return (
        f"Chosen: {found.trial.candidate.text()}. Search prompts: predicted "
        f"{found.trial.speedup:.2f}x, {_db(found.trial.psnr)}. Prompts that the search did not "
        f"see: measured {factor['median']:.2f}x (10th to 90th percentile {factor['p10']:.2f} to "
        f"{factor['p90']:.2f} of {checked['pairs']} interleaved pairs of whole runs), "
        f"{_db(checked['psnr'])}; dense {checked['dense_seconds']:.3g} s per picture, tuned "
        f"{checked['seconds']:.3g} s."
    )


def _db(psnr: float | None) -> str:
    return "identical" if psnr is None or math.isinf(psnr) else f"{psnr:.1f} dB PSNR"


def _table(found: Found) -> str:
    """What is on the front, presets and fewer steps, the slowest first."""
    best = [trial for trial in front(found.search.trials.values()) if trial.speedup > 1]
    count = min(ROWS, len(best))
    shown = {best[i * (len(best) - 1) // max(count - 1, 1)] for i in range(count)}
    rows = [
        ("-> " if trial == found.trial else "", trial.speedup, trial.psnr, trial.candidate.text())
        for trial in {*shown, found.trial}
    ]
    rows += [("", speedup, psnr, name) for name, speedup, psnr in found.others]
    lines = [f"   {'speed-up':>8}  {'PSNR':>9}  setting"]
    for mark, speedup, psnr, name in sorted(rows, key=lambda row: (row[1], row[3])):
        value = "identical" if math.isinf(psnr) else f"{psnr:.1f} dB"
        lines.append(f"{mark:3}{speedup:7.2f}x  {value:>9}  {name}")
    lines.append("   (speed-ups as predicted from measured costs; PSNR on the search prompts)")
    return "\n".join(lines)


def _result(argv, args, settings, where, found: Found) -> dict[str, Any]:
    """``result.json``: everything; a PSNR of None stands for the same pictures."""

    def row(trial: Trial) -> dict[str, Any]:
        psnr = None if math.isinf(trial.psnr) else trial.psnr
        options = trial.candidate.options()
        return {"options": options, "speedup": trial.speedup, "psnr": psnr, "mse": trial.mse}

    return {
        "command": ["tune", *argv],
        "goal": {"speedup": args.speedup, "psnr": args.psnr},
        "settings": settings,
        "chosen": row(found.trial),
        "unseen": found.checked,
        "notes": found.notes,
        "trials": [row(trial) for trial in found.search.trials.values()],
        "path": [row(trial) for trial in found.search.path],
        "others": [
            {"name": name, "speedup": x, "psnr": None if math.isinf(y) else y}
            for name, x, y in found.others
        ],
        "environment": where,
    }
