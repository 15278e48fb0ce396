# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What an evaluation is of: what is given, else the config's ``evaluation``, else the defaults.

::

    evaluation = dict(
        prompts='demo',  # or a file, relative to the config, or a list
        limit=50,
        methods=['tome:0.5', dict(name='both', tome_cfg=dict(ratio=0.5, cache='balanced'))],
        fewer_steps=[0.8, 0.5],
        metrics=['psnr', dict(name='lpips', net='alex')],
    )
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import ToMeError
from ..validate import check_choice, check_integer, check_keys, did_you_mean
from .devices import DTYPES
from .methods import BASELINE, Method, check_names, fewer_steps, parse_method
from .metrics import check_metric
from .prompts import read_prompts, request_for, spread
from .real import RealImages
from .request import Request
from .runners.base import Source

DEFAULT_METHODS = ("tome:0.25", "tome:0.5", "tome:0.75")
# Shares of the steps. Half of them is about what ratio 0.5 promises at best.
DEFAULT_FEWER_STEPS = (0.8, 0.65, 0.5)
_REQUEST = tuple(field.name for field in fields(Request) if field.name != "prompts")
_LISTS = ("methods", "fewer_steps", "only", "metrics")
KEYS = ("prompts", "limit", "real", "rounds", "dtype", *_LISTS, *_REQUEST)


@dataclass(frozen=True)
class Plan:
    """Arguments of :func:`~.evaluate.evaluate`."""

    request: Request
    methods: list[Method]
    metrics: Sequence[Any] | None
    rounds: int
    real: RealImages | None
    dtype: torch.dtype | None


def plan_of(source: Source, **given: Any) -> Plan:
    """What to evaluate: what is given, None and empty lists aside, else what the source's
    ``evaluation`` and ``defaults`` say.

    - ``prompts``: a file, a built-in set or a list (see :func:`~.prompts.read_prompts`);
      ``limit``.
    - ``methods``: :class:`Method`, dicts for :meth:`Method.from_dict`, or texts for
      :func:`~.methods.parse_method`. Default: what the config applies, else ratios 0.25, 0.5, 0.75.
    - ``fewer_steps``: shares or numbers of steps. Default: 0.8, 0.65 and 0.5, if the number of
      steps is stated.
    - ``only``: names of the methods to keep, with ``*`` and ``?``.
    - ``metrics``: names, or dicts of a ``name`` and options.
    - ``real``: a folder; ``rounds``; ``dtype``: ``'fp32'``, ``'fp16'`` or ``'bf16'``.
    - fields of a :class:`Request`.

    Raises:
        ToMeError: An unknown key, a value out of range, no prompts.
    """
    stated = dict(source.evaluation)
    check_keys("evaluation of the config", stated, KEYS)
    check_keys("evaluate", given, KEYS)
    for key in ("prompts", "real"):  # paths are relative to the config if something is there
        beside = Path(source.path).parent / str(stated.get(key))
        if isinstance(stated.get(key), str) and beside.exists():
            stated[key] = str(beside)
    values = {**stated, **{key: one for key, one in given.items() if one is not None and one != []}}
    for key in _LISTS:
        if key in values and not isinstance(values[key], (list, tuple)):
            raise ToMeError(f"evaluate: {key} must be a list, got {values[key]!r}")
    if values.get("limit") is not None:
        check_integer("evaluate: ", "limit", values["limit"], 1)
    for entry in values.get("metrics") or ():
        check_metric(entry)

    request = _request(source, values)
    real, dtype = values.get("real"), values.get("dtype")
    return Plan(
        request=request,
        methods=_methods(source, values, request.steps),
        metrics=values.get("metrics"),
        rounds=check_integer("evaluate: ", "rounds", values.get("rounds", 9), 0),
        real=None if real is None else RealImages(real),
        dtype=None if dtype is None else DTYPES[check_choice("evaluate: ", "dtype", dtype, DTYPES)],
    )


def _request(source: Source, values: Mapping[str, Any]) -> Request:
    given = {key: values.get(key) for key in _REQUEST}
    prompts = values.get("prompts", source.defaults.get("prompts"))
    if prompts is None:
        raise ToMeError("no prompts: pass a file, or one of the sets demo and demo-held-out")
    return request_for(source, spread(read_prompts(prompts), values.get("limit")), given)


def _methods(source: Source, values: Mapping[str, Any], steps: int | None) -> list[Method]:
    own, entries = source.setting, values.get("methods")
    if not entries:
        entries = DEFAULT_METHODS if own.baseline else [Method(own.description, own)]
    found = [_method(entry) for entry in entries]
    fewer = values.get("fewer_steps")
    if fewer is None:
        stated = any(method.kind == "fewer steps" for method in found)
        fewer = () if stated or steps is None else DEFAULT_FEWER_STEPS
    if fewer and steps is None:
        raise ToMeError("evaluate: fewer_steps than how many? state steps too")
    found += fewer_steps(fewer, steps or 0)
    check_names([BASELINE, *found])
    wanted, names = values.get("only"), [method.name for method in found]
    if wanted is None:
        return found
    for name in wanted:
        if not fnmatch.filter(names, name):
            hint = did_you_mean(name, names)
            raise ToMeError(f"only: no method is called {name!r}: {hint}there are {names}")
    return [one for one in found if any(fnmatch.fnmatchcase(one.name, name) for name in wanted)]


def _method(entry: Any) -> Method:
    if isinstance(entry, Method):
        return entry
    return parse_method(entry) if isinstance(entry, str) else Method.from_dict(entry)
