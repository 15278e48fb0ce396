# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the ``evaluate`` command does: pictures, measures, cost, results, report, in this order.

Each stage looks at the folder for what is done already, so every run of the command is a
continuation, a first one of an empty folder.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..apis.infer import environment, quiet_libraries
from ..apis.model_config import (
    build_model,
    check_config,
    check_device,
    component,
    inner_model,
    load_config,
)
from ..apis.text2image import Generator
from ..apply import remove_cache, remove_tome
from ..errors import ToMeError
from ..schedulers import scheduler_name
from .dry_run import dry_run
from .generate import PictureRequest, fingerprint, make_pictures, too_long
from .plan import Plan, make_plan
from .real import RealPictures, find_real
from .report import write_report
from .report.table import check_markers, replace_table
from .results import results_of
from .scores import Measurer, Metrics, build_metrics
from .store import RunFolder, differences
from .team import Team
from .timing import cost_key, is_complete, measure_cost


def command(args, argv) -> None:
    """Do what the ``evaluate`` command was asked to; see ``cli.py`` for ``args``.

    Raises:
        ToMeError: For input that cannot work, before a model is loaded wherever that can be
            told without one.
    """
    if args.launcher == "none":
        _evaluate(args, argv)
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    # Hands the traceback of a rank that dies to torchrun, which ends the others and shows it.
    record(_evaluate)(args, argv)


def _evaluate(args, argv) -> None:
    device = _device(args)
    config = load_config(args.config_path, args.cfg_options)
    plan = make_plan(args, config, args.config_path)
    request = _request(plan)
    check_config(config, request, None, compare=False)
    if args.dry_run:
        dry_run(args, config, plan, device)
        return
    if args.write_table:
        check_markers(args.write_table)
    metrics = build_metrics(plan.metrics, device, len(request.prompts), _size(plan, config))
    real = None if plan.real is None else find_real(plan.real, (1, 1), plan.real_per_class)

    team = Team(args.launcher, device.type)
    quiet_libraries()
    folder = RunFolder(args.folder)
    with folder.locked() if team.rank == 0 else nullcontext():
        try:
            _stages(args, argv, config, plan, request, metrics, real, device, team, folder)
        finally:
            if sys.exc_info()[0] is None:
                team.close()


def _stages(args, argv, config, plan, request, metrics, real, device, team, folder) -> None:
    say = print if team.rank == 0 else _silent
    team.check_shared(folder.path)
    threads = _threads(folder, args.overwrite)
    say(f"building {inner_model(config).type} of {args.config} on {device}")
    model = build_model(config, device, plan.dtype)
    # The config's own setting is a contender like any other.
    remove_tome(model)
    remove_cache(model)
    generator = Generator(model, request)
    if real is not None:
        real.size = generator.size
    cut = too_long(generator)
    if cut:
        plan.prompts.notes.append(f"{len(cut)} prompts are longer than the model reads; it cuts")
    for note in _notes(plan, metrics, real):
        say(f"note: {note}")

    basis = fingerprint(generator, device)
    specs = {contender.name: contender.spec() for contender in plan.contenders}
    if team.rank == 0:
        dense = None if args.dense is None else RunFolder(args.dense)
        if dense is not None and dense.manifest() is None:
            raise ToMeError(f"--dense: {args.dense} holds no evaluation (no manifest.json)")
        folder.open(basis, specs, args.overwrite)
        if folder.read_json("threads.json") is None:
            folder.save_json("threads.json", {"threads": threads})
        if dense is not None:
            numbers = range(len(request.prompts))
            spec = plan.dense.spec()
            taken = folder.adopt_dense(dense, basis, spec, numbers)
            say(f"{taken} dense pictures taken from {args.dense}")
    team.wait()
    changed = differences(folder.manifest(), basis, specs)
    if changed:
        raise ToMeError(f"rank {team.rank} is not like rank 0: it differs in {'; '.join(changed)}")

    made = make_pictures(generator, plan.contenders, folder, team)
    team.wait()
    total = len(plan.contenders) * len(request.prompts)
    say(f"pictures: {total} in all, {made} made now by this process")
    texts = [prompt.text for prompt in plan.prompts.prompts]
    measurer = Measurer(folder, plan.contenders, metrics, texts, real)
    measurer.run(team)
    team.wait()
    if team.rank != 0:
        return

    where = environment(device)
    cost = _cost(generator, plan, folder, basis, where)
    results = results_of(
        plan=plan,
        measurer=measurer,
        cost=cost,
        notes=_notes(plan, metrics, real),
        basis=basis,
        about={
            "command": ["evaluate", *argv],
            "config": args.config,
            "scheduler": scheduler_name(model.test_scheduler),
            "real": None if real is None else {"folder": Path(plan.real).name, "n": len(real)},
            "environment": {**where, "threads": torch.get_num_threads()},
            "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "processes": team.size,
        },
    )
    table = write_report(folder, results, measurer, generator)
    if args.write_table:
        replace_table(args.write_table, table)
        say(f"table written into {args.write_table}")
    say(f"\n{table}\n")
    say(f"results, table and report.html: {folder.path}")


def _cost(generator, plan: Plan, folder: RunFolder, basis, where) -> dict[str, Any] | None:
    """Return the measured cost, of which the folder may have some rounds or all.

    They belong to the same contenders, pictures and machine; else all is measured anew. Without
    rounds to measure it is the folder's, or None.
    """
    place = {key: where[key] for key in ("processor", "cpus", "gpu")}
    place.update(host=socket.gethostname(), threads=torch.get_num_threads())
    key = cost_key(basis, plan.contenders, place)
    held = folder.read_json("cost.json")
    if held is not None and held.get("key") != key:
        held = None
    if plan.cost_rounds == 0:
        return held if is_complete(held) else None
    pictures = len(generator.request.batches()[0][: plan.cost_batch_size])
    if held is not None and held["pictures"] != pictures:
        held = None
    if is_complete(held) and held["rounds"] >= plan.cost_rounds:
        return held
    before = [] if held is None else held["load_average_1min"]

    def save(cost: dict[str, Any]) -> None:
        load = [*before, where["load_average_1min"], environment_load()]
        folder.save_json("cost.json", {**cost, "key": key, "load_average_1min": load})

    measure_cost(
        generator, plan.contenders, plan.cost_rounds, held, save, batch_size=plan.cost_batch_size
    )
    return folder.read_json("cost.json")


def environment_load() -> float | None:
    """Return how many processes wanted to run in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _device(args) -> torch.device:
    """Return the device of this process: one GPU per local rank."""
    device = check_device(args.device)
    local = os.environ.get("LOCAL_RANK")
    if args.launcher != "none" and device.type == "cuda" and local is not None:
        device = check_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    return device


def _request(plan: Plan) -> PictureRequest:
    prompts = plan.prompts.prompts
    return PictureRequest(
        prompts=[prompt.text for prompt in prompts],
        steps=plan.steps,
        guidance=plan.guidance,
        size=plan.size,
        batch_size=plan.batch_size,
        pictures=prompts,
    )


def _size(plan: Plan, config) -> tuple[int, int] | None:
    """Return the size of the pictures as far as it can be told without loading the model."""
    if plan.size is not None:
        return plan.size
    model = inner_model(config)
    side = component(model, "unet").get("sample_size")
    levels = component(model, "vae").get("block_out_channels")
    return (side * 2 ** (len(levels) - 1),) * 2 if isinstance(side, int) and levels else None


def _threads(folder: RunFolder, overwrite: bool) -> int:
    """Compute with as many threads as the run that is gone on with; return their number.

    Sums in another order differ in their last bits, and an interrupted evaluation shall give
    the pixels of an uninterrupted one.
    """
    held = None if overwrite else folder.read_json("threads.json")
    if held is not None:
        torch.set_num_threads(held["threads"])
    return torch.get_num_threads()


def _notes(plan: Plan, metrics: Metrics, real: RealPictures | None) -> list[str]:
    notes = [*plan.prompts.notes, *(real.notes if real is not None else ())]
    notes += [f"metric {name} is left out: {reason}" for name, reason in metrics.skipped.items()]
    if real is None and any(metric.needs_real for metric in metrics.sets().values()):
        notes.append(
            "no real pictures were given: metrics of sets compare with the dense set, and say "
            "how far a contender is from the dense model, not how good it is"
        )
    return notes


def _silent(*_: object) -> None:
    pass
