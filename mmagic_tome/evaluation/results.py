# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""All results of an evaluation as one JSON-able dict, which tables and reports are made of."""

from __future__ import annotations

from typing import Any

from .contenders import DENSE, Contender
from .plan import Plan
from .scores import Measurer
from .timing import FEWEST_ROUNDS, summarise


def results_of(
    *,
    plan: Plan,
    measurer: Measurer,
    cost: dict | None,
    notes: list[str],
    basis: dict[str, Any],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Return the results.

    Args:
        plan: What was asked for.
        measurer: Which has computed everything.
        cost: Raw figures of ``measure_cost``, or None if it was left out.
        notes: What a reader should know, one sentence each.
        basis: Fingerprint of the pictures.
        about: Command, environment and the like, taken over as it is.

    Returns:
        ``about``'s entries, ``settings``, ``prompts``, ``notes`` and ``contenders``: one dict
        each with ``name``, ``kind``, ``ratio``, ``steps``, ``options``, ``pictures``,
        ``skipped_pictures`` (NaN or infinite ones), ``tokens_removed``, ``quality`` (see
        ``Measurer.results``) and ``cost`` (see ``summarise``; None if left out). No NaN or
        infinity.
    """
    costs = {} if cost is None else summarise(cost, DENSE)
    rows = [_row(c, plan, measurer, costs.get(c.name)) for c in plan.contenders]
    bad = [f"{row['skipped_pictures']} of {row['name']}" for row in rows if row["skipped_pictures"]]
    if bad:
        notes = [*notes, f"pictures with NaN or infinity, in no mean: {', '.join(bad)}"]
    unclear = [row["name"] for row in rows if row["cost"] and not row["cost"]["certain"]]
    if cost is not None and cost["rounds"] < FEWEST_ROUNDS:
        notes = [
            *notes,
            f"fewer than {FEWEST_ROUNDS} rounds of timing have no spread to speak of: no speed-up "
            "here is certain (--cost-rounds)",
        ]
    elif unclear:
        notes = [
            *notes,
            "the spread of these speed-ups reaches across 1x, so they may be none: "
            + ", ".join(unclear),
        ]
    return {
        "format": 1,
        **about,
        "settings": {key: value for key, value in basis.items() if key != "prompts"},
        "prompts": {
            "source": plan.prompts.source,
            "pictures": len(plan.prompts.prompts),
            "digest": plan.prompts.digest(),
        },
        "notes": notes,
        "cost_measured": None
        if cost is None
        else {
            "rounds": cost["rounds"],
            "pictures_per_run": cost["pictures"],
            "load_average_1min": cost["load_average_1min"],
            "what": "whole model.infer calls after a warm-up, all contenders in turn; "
            "raw figures in cost.json",
            "blocks": {name: f["blocks"] for name, f in cost["contenders"].items()},
            "memory": "most that tensors hold at once above the weights, in a whole run and in one "
            "forward of the network",
        },
        "contenders": rows,
    }


def _row(contender: Contender, plan: Plan, measurer: Measurer, cost) -> dict[str, Any]:
    good = measurer.good(contender.folder)
    # Tokens of all targets of the last forward; every picture has as many.
    record = measurer.records[contender.folder, 0]
    tokens, kept = record["tokens"], record["kept"]
    return {
        "name": contender.name,
        "kind": contender.kind,
        "ratio": contender.ratio,
        "steps": contender.steps or plan.steps,
        "options": contender.options(),
        "pictures": len(good),
        "skipped_pictures": len(plan.prompts.prompts) - len(good),
        "tokens_removed": 1 - kept / tokens if tokens else None,
        "quality": measurer.results(contender),
        "cost": cost,
    }


def picture_rows(plan_contenders, measurer: Measurer) -> list[dict[str, Any]]:
    """Return one dict per contender and picture: its seed, prompt, and all paired values."""
    rows = []
    paired = [n for n, m in measurer.metrics.named.items() if n not in measurer.metrics.sets()]
    for contender in plan_contenders:
        values: dict[str, dict[int, float]] = {}
        if contender.kind != DENSE:
            for name in paired:
                numbers, found = measurer.values(name, contender.folder)
                values[name] = dict(zip(numbers, found.tolist()))
        for number, prompt in enumerate(measurer.prompts):
            record = measurer.records[contender.folder, number]
            rows.append(
                {
                    "contender": contender.name,
                    "number": number,
                    "seed": record["seed"],
                    "prompt": prompt,
                    "finite": record["finite"],
                    **{name: values.get(name, {}).get(number) for name in paired},
                }
            )
    return rows
