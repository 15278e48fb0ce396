# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What an evaluation is to do: the command's options, else the config's, else the defaults.

A config states its part in ``evaluation``::

    evaluation = dict(
        prompts='prompts.txt',                    # or prompt_set='demo'
        contenders=[dict(name='ToMe', tome_cfg=dict(ratio=0.5)), dict(name='DDIM', steps=30)],
        metrics=['psnr', 'ssim'],
    )
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..apis.command_line import VALUES, check_default, number
from ..apis.model_config import setting_config
from ..config import ToMeConfig
from ..contenders import parse_named
from ..errors import ToMeError
from ..settings import Setting
from ..validate import check_keys, did_you_mean
from . import contenders as c
from .prompts import PromptList, load_prompts

# Keys of `evaluation`, which are the options of the command.
KEYS = (
    "prompts",
    "prompt_set",
    "prompt_template",
    "images_per_prompt",
    "limit",
    "negative_prompt",
    "seed",
    "real",
    "real_per_class",
    "steps",
    "guidance",
    "size",
    "batch_size",
    "dtype",
    "ratios",
    "methods",
    "cache",
    "tomesd",
    "fewer_steps",
    "contenders",
    "only",
    "metrics",
    "cost_rounds",
    "cost_batch_size",
)
# What `infer_cfg` may give as well.
SHARED = ("steps", "guidance", "size", "seed", "batch_size", "negative_prompt")
DEFAULTS = {"steps": 50, "guidance": 7.5, "seed": 0, "batch_size": 1, "cost_rounds": 5}
NUMBERS = {
    **VALUES,
    "images_per_prompt": number(int, low=1),
    "limit": number(int, low=1),
    "real_per_class": number(int, low=1),
    "cost_rounds": number(int, low=0),
    "cost_batch_size": number(int, low=1),
}


@dataclass
class Plan:
    """Everything about an evaluation that is known without a model.

    Args:
        prompts: One per picture.
        contenders: Dense first.
        metrics: As asked for; None for the defaults.
        real: Folder of real pictures, or None.
        real_per_class: Real pictures of every sub-folder, None for all.
        steps, guidance, size, batch_size: Of the pictures; a size of None is the model's own.
        dtype: 'fp32', 'fp16', 'bf16', or None for what the config says.
        cost_rounds: Rounds of the measurement of cost; 0 leaves it out.
        cost_batch_size: Pictures per run in that measurement; None for ``batch_size``.
    """

    prompts: PromptList
    contenders: list[c.Contender]
    metrics: list[Any] | None
    real: str | None
    real_per_class: int | None
    steps: int
    guidance: float
    size: tuple[int, int] | None
    batch_size: int
    dtype: str | None
    cost_rounds: int
    cost_batch_size: int | None

    @property
    def dense(self) -> c.Contender:
        return self.contenders[0]


def make_plan(args, config, config_path) -> Plan:
    """Return the plan of a command and a config.

    Args:
        args: Parsed options; those that were not given are None.
        config: mmengine's ``Config``.
        config_path: Its file. Relative paths in its ``evaluation`` are relative to it.

    Raises:
        ToMeError: At the first thing that cannot work.
    """
    given = _section(config, "evaluation", KEYS)
    values = {**DEFAULTS, **_shared(config), **_checked(given)}
    for key in KEYS:
        option = getattr(args, key, None)
        if option is not None and option != []:
            values[key] = option
    # Either one on the command line stands in place of both in the config.
    if args.prompts is not None:
        values.pop("prompt_set", None)
    elif args.prompt_set is not None:
        values.pop("prompts", None)
    if args.prompts is None and isinstance(values.get("prompts"), str):
        values["prompts"] = _beside(values["prompts"], config_path)
    if args.real is None and values.get("real") is not None:
        values["real"] = _beside(values["real"], config_path)

    if values.get("prompts") is not None and values.get("prompt_set") is not None:
        raise ToMeError("prompts and prompt_set are both given; leave one of them out")
    source = values.get("prompts", values.get("prompt_set"))
    if source is None:
        raise ToMeError("no prompts: pass --prompts FILE, or --prompt-set demo or imagenet")
    if values.get("prompts") is None and source not in ("demo", "imagenet"):
        raise ToMeError(f"prompt_set: there are demo and imagenet, got {source!r}")
    prompts = load_prompts(
        source,
        template=values.get("prompt_template"),
        images_per_prompt=values.get("images_per_prompt", 1),
        limit=values.get("limit"),
        seed=values["seed"],
        negative=values.get("negative_prompt"),
    )
    return Plan(
        prompts=prompts,
        contenders=_contenders(args, values, setting_config(config)),
        metrics=values.get("metrics"),
        real=values.get("real"),
        real_per_class=values.get("real_per_class"),
        steps=values["steps"],
        guidance=values["guidance"],
        size=values.get("size"),
        batch_size=values["batch_size"],
        dtype=values.get("dtype"),
        cost_rounds=values["cost_rounds"],
        cost_batch_size=_cost_batch_size(values),
    )


def _cost_batch_size(values) -> int | None:
    """Return how many pictures are made at once while the cost is measured."""
    wanted, most = values.get("cost_batch_size"), values["batch_size"]
    if wanted is not None and wanted > most:
        raise ToMeError(
            f"cost_batch_size {wanted} is more than batch_size {most}; the cost is that of a part "
            f"of the first batch, so write at most {most}, or --batch-size {wanted}"
        )
    return wanted


def _section(config, name, known) -> dict[str, Any]:
    section = config.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ToMeError(f"{name} of the config: expected a dict, got {section!r}")
    check_keys(f"{name} of the config", section, known)
    return {key: value for key, value in dict(section).items() if value is not None}


def _shared(config) -> dict[str, Any]:
    """Return what the config's ``infer_cfg`` says about pictures in general."""
    section = config.get("infer_cfg")
    if not isinstance(section, Mapping):
        return {}
    found = {key: section[key] for key in SHARED if section.get(key) is not None}
    return {key: check_default(key, value) for key, value in found.items()}


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """Return the config's values as the options of the command would give them."""
    checked = dict(given)
    for key, parse in NUMBERS.items():
        if key in checked:
            value = checked[key]
            if key == "size" and isinstance(value, (list, tuple)):
                value = "x".join(map(str, value))
            try:
                checked[key] = parse(str(value))
            except argparse.ArgumentTypeError as error:
                raise ToMeError(f"evaluation.{key} of the config: {error}") from None
    for key in ("prompt_template", "negative_prompt", "real", "dtype", "prompt_set"):
        if key in checked and not isinstance(checked[key], str):
            raise ToMeError(f"evaluation.{key} of the config: expected a text")
    if checked.get("dtype") not in (None, "fp32", "fp16", "bf16"):
        raise ToMeError("evaluation.dtype of the config: write fp32, fp16 or bf16")
    for key in ("ratios", "methods", "cache", "tomesd", "fewer_steps", "only", "metrics"):
        if key in checked and not isinstance(checked[key], (list, tuple)):
            raise ToMeError(f"evaluation.{key} of the config: expected a list")
    for key in ("methods", "cache"):
        for value in checked.get(key, ()):
            if not isinstance(value, str):
                raise ToMeError(
                    f"evaluation.{key} of the config: {value!r} is no name; one with options is "
                    "written as contenders=[dict(name=..., tome_cfg=dict(...), cache_cfg=...)]"
                )
    for value in checked.get("only", ()):
        if not isinstance(value, str):
            raise ToMeError(f"evaluation.only of the config: {value!r} is no name of a contender")
    for key in ("ratios", "tomesd", "fewer_steps"):
        for value in checked.get(key, ()):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ToMeError(f"evaluation.{key} of the config: {value!r} is no number")
    return checked


def _beside(path: str, config_path) -> str:
    """Return a path of a config: as it is, or relative to the config's folder."""
    found = Path(path).expanduser()
    return str(found if found.is_absolute() else Path(config_path).parent / found)


def _contenders(args, values, setting: Setting) -> list[c.Contender]:
    """Return all contenders, dense first and fewer steps last."""
    steps = values["steps"]
    sweeps = ("ratios", "methods", "cache", "tomesd")
    given = {key: getattr(args, key, None) for key in sweeps}
    found: list[c.Contender] = []
    if not args.tome and not any(given.values()):
        # Nothing on the command line: what the config says.
        given = {key: values.get(key) for key in sweeps}
        found += c.from_config(values.get("contenders") or [])
    found += _sweep(given["ratios"], given["methods"], setting)
    found += [c.merged(f"cache {name}", {"cache": name}) for name in given["cache"] or ()]
    found += [c.merged(*parse_named(text)) for text in args.tome or ()]
    found += [c.tomesd_contender(f"tomesd {r:g}", r) for r in given["tomesd"] or ()]
    if not found:
        if not setting.baseline:
            own = c.Contender("the config's", setting=setting)
            # With a schedule there is no one ratio to call it by, and caching alone has none.
            name = f"ratio {own.ratio:g}" if own.ratio else own.name
            found = [c.Contender(name, setting=setting)]
        else:
            found = [c.merged(f"ratio {r:g}", {"ratio": r}) for r in c.DEFAULT_RATIOS]
    if values.get("fewer_steps") is not None:
        found += c.fewer_steps(values["fewer_steps"], steps)
    elif not any(contender.kind == "steps" for contender in found):
        found += c.fewer_steps(c.DEFAULT_FEWER_STEPS, steps)
    for contender in found:
        if contender.kind == "steps" and contender.steps >= steps:
            raise ToMeError(
                f"contender {contender.name!r} has {contender.steps} steps, dense has {steps}; "
                "write fewer"
            )
    found = [c.Contender(c.DENSE), *found]
    c.check_names(found)
    return found if values.get("only") is None else _only(values["only"], found)


def _only(wanted, found: list[c.Contender]) -> list[c.Contender]:
    """Return dense and the contenders that are named, in the order in which they were found.

    A name may have ``*`` and ``?`` in it, as names of files do in a shell.
    """
    names = [contender.name for contender in found[1:]]
    for name in wanted:
        if not any(fnmatch.fnmatchcase(known, name) for known in names):
            hint = did_you_mean(name, names)
            raise ToMeError(f"only: no contender is called {name!r}: {hint}There are {names}")
    taken = [x for x in found[1:] if any(fnmatch.fnmatchcase(x.name, name) for name in wanted)]
    return [found[0], *taken]


def _sweep(ratios, methods, setting: Setting) -> list[c.Contender]:
    """Return token merging at each ratio, by each method if some are named.

    The other options are those of the config's own setting, and without ratios its own one.
    """
    base = setting.to_dict()
    if not methods:
        return [c.merged(f"ratio {r:g}", {**base, "ratio": r}) for r in ratios or ()]
    own = c.Contender("", setting=Setting(ToMeConfig.coerce(setting.tome))).ratio
    if not ratios and own is None:
        raise ToMeError("--methods of a config with a schedule of ratios: write --ratios too")
    return [
        c.merged(f"{method} {r:g}", {**base, "ratio": r, "method": method})
        for method in methods
        for r in ratios or (own,)
    ]
