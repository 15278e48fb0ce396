# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is compared: dense, merging and caching in any setting, tomesd, DeepCache, fewer steps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from .. import StepCacheConfig, ToMeConfig, remove_cache, remove_tome
from ..contenders import apply_deepcache, apply_tomesd, require_deepcache, require_tomesd
from ..errors import ToMeError
from ..settings import Handles, Setting
from ..version import __version__

DENSE = "dense"
DEFAULT_RATIOS = (0.25, 0.5, 0.75)
# Shares of the steps. Half the steps is about what ratio 0.5 promises at best.
DEFAULT_FEWER_STEPS = (0.8, 0.65, 0.5)
KEYS = ("name", "tome_cfg", "cache_cfg", "tomesd", "deepcache", "steps")


@dataclass(frozen=True)
class Contender:
    """A way of making the pictures.

    Args:
        name: Unique in an evaluation; appears in tables and plots.
        setting: This package's token merging, step caching or both; or None.
        tomesd: Options of ``tomesd.apply_patch``, or None.
        deepcache: Options of ``DeepCacheSDHelper.set_params``, or None.
        steps: Denoising steps, or None for those of the evaluation.
    """

    name: str
    setting: Setting | None = None
    tomesd: Mapping[str, Any] | None = field(default=None, hash=False)
    deepcache: Mapping[str, Any] | None = field(default=None, hash=False)
    steps: int | None = None

    @property
    def kind(self) -> str:
        """'dense', 'tome', 'tomesd', 'deepcache' or 'steps' (dense with fewer steps)."""
        if self.setting is not None:
            return "tome"
        if self.tomesd is not None:
            return "tomesd"
        if self.deepcache is not None:
            return "deepcache"
        return "dense" if self.steps is None else "steps"

    @property
    def ratio(self) -> float | None:
        """Share of tokens it removes at a target, 0 if it merges none; None for a schedule."""
        if self.setting is not None:
            ratio = 0.0 if self.setting.tome is None else self.setting.tome.ratio
            return ratio if isinstance(ratio, (int, float)) else None
        return 0.0 if self.tomesd is None else self.tomesd["ratio"]

    @property
    def folder(self) -> str:
        """Its name as a name of a folder."""
        return slug(self.name)

    def spec(self) -> dict[str, Any]:
        """Return everything that its pictures depend on besides the request; JSON-able.

        Of the options of its setting those that are not the default: a version of this package
        that has learnt another option goes on with the pictures of one that had not.
        """
        spec: dict[str, Any] = {"kind": self.kind, "steps": self.steps}
        if self.setting is not None:
            if self.setting.tome is not None:
                usual = ToMeConfig().to_dict()
                options = self.setting.tome.to_dict()
                spec["tome_cfg"] = {k: v for k, v in options.items() if v != usual.get(k)}
            if self.setting.cache is not None:
                usual = StepCacheConfig().to_dict()
                spec["cache_cfg"] = [
                    {k: v for k, v in one.to_dict().items() if k == "region" or v != usual[k]}
                    for one in self.setting.cache
                ]
            spec["mmagic_tome"] = __version__
        if self.tomesd is not None:
            spec["tomesd_options"] = dict(self.tomesd)
            spec["tomesd"] = metadata.version("tomesd")
        if self.deepcache is not None:
            spec["deepcache_options"] = dict(self.deepcache)
            spec["deepcache"] = metadata.version("DeepCache")
        return spec

    def options(self) -> dict[str, Any] | None:
        """Return all options of its setting, those of the default too; None for dense ones."""
        if self.setting is not None:
            return self.setting.to_dict()
        other = self.tomesd if self.tomesd is not None else self.deepcache
        return None if other is None else dict(other)

    @contextmanager
    def on(self, model) -> Iterator[Handles]:
        """Turn the model into this contender; on exit it is dense again.

        Args:
            model: A MMagic model, or a network that ``apply_tome`` takes.

        Yields:
            The handles of what this package has applied.
        """
        remove_tome(model)
        remove_cache(model)
        if self.setting is not None:
            with self.setting.apply(model) as handles:
                yield handles
        elif self.tomesd is not None:
            # A new patch per run, with a new generator: the same picture however often it is run.
            network = apply_tomesd(model, self.tomesd)
            try:
                yield Handles()
            finally:
                import tomesd

                tomesd.remove_patch(network)
        elif self.deepcache is not None:
            helper = apply_deepcache(model, self.deepcache)
            try:
                yield Handles()
            finally:
                helper.disable()
        else:
            yield Handles()


def slug(name: str) -> str:
    """Return a name as lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "contender"


def merged(name: str, options: Any, steps: int | None = None) -> Contender:
    """Return a contender with this package's token merging, step caching or both.

    Args:
        name: Its name.
        options: Whatever ``Setting.coerce`` takes. An empty dict merges by default options, as a
            config's ``tome_cfg`` does.
        steps: Denoising steps, None for those of the evaluation.

    Raises:
        ToMeError: Invalid options, with the name of the contender.
    """
    try:
        setting = Setting.coerce(ToMeConfig() if options == {} else options)
        json.dumps(setting.to_dict())
    except ToMeError as error:
        raise ToMeError(f"contender {name!r}: {error}") from None
    except TypeError:
        raise ToMeError(
            f"contender {name!r} has an option that is a function or an object; its pictures could "
            "not be told from another's. Write it as numbers, texts, lists and dicts"
        ) from None
    if setting.baseline:
        raise ToMeError(
            f"contender {name!r} neither merges nor skips anything; write options such as "
            "dict(ratio=0.5) or dict(cache='balanced')"
        )
    return Contender(name, setting=setting, steps=steps)


def from_config(entries: Any) -> list[Contender]:
    """Return the contenders that a config lists.

    Args:
        entries: A list of dicts with ``name`` and one or more of ``tome_cfg`` (which may have
            the key ``cache``), ``cache_cfg``, ``tomesd`` (options of its ``apply_patch``, such as
            ``dict(ratio=0.5)``), ``deepcache`` and ``steps``.

    Raises:
        ToMeError: A wrong entry, with its number.
    """
    if not isinstance(entries, (list, tuple)):
        raise ToMeError(f"evaluation.contenders: expected a list of dicts, got {entries!r}")
    found = []
    for number, entry in enumerate(entries, start=1):
        where = f"evaluation.contenders, entry {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ToMeError(f"{where}: write dict(name='...', tome_cfg=dict(ratio=0.5))")
        unknown = sorted(set(entry) - set(KEYS))
        if unknown:
            raise ToMeError(f"{where} has unknown keys {unknown}; it takes {KEYS}")
        entry = _with_cache_inside(entry, where)
        name, steps = entry["name"], entry.get("steps")
        ways = [key for key in ("tome_cfg", "tomesd", "deepcache") if entry.get(key) is not None]
        if steps is not None and not (type(steps) is int and steps > 0):
            raise ToMeError(f"{where}: steps must be a whole number above 0, got {steps!r}")
        if len(ways) > 1:
            raise ToMeError(f"{where} has both {' and '.join(ways)}; write two contenders")
        if entry.get("tome_cfg") is not None:
            found.append(merged(name, entry["tome_cfg"], steps))
        elif entry.get("tomesd") is not None:
            found.append(tomesd_contender(name, entry["tomesd"], steps))
        elif entry.get("deepcache") is not None:
            found.append(deepcache_contender(name, entry["deepcache"], steps))
        elif steps is not None:
            found.append(Contender(name, steps=steps))
        else:
            raise ToMeError(f"{where} has neither tome_cfg, cache_cfg, tomesd, deepcache nor steps")
    return found


def _with_cache_inside(entry: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return an entry of a config with its ``cache_cfg`` as the key ``cache`` of its tome_cfg."""
    cache, tome = entry.get("cache_cfg"), entry.get("tome_cfg")
    if cache is None:
        return entry
    if isinstance(tome, Mapping) and tome.get("cache") is not None:
        raise ToMeError(f"{where} has both cache_cfg and tome_cfg=dict(cache=...); keep one")
    if isinstance(tome, Mapping):
        # An empty tome_cfg merges by default options.
        tome = {**(tome or ToMeConfig().to_dict()), "cache": cache}
    else:
        try:
            tome = Setting.coerce(tome).replace(cache=cache)
        except ToMeError as error:
            raise ToMeError(f"{where}: {error}") from None
    return {**entry, "tome_cfg": tome}


def tomesd_contender(name: str, options: Any, steps: int | None = None) -> Contender:
    """Return the PyPI package ``tomesd`` as a contender.

    Args:
        name: Its name.
        options: A ratio, or options of ``tomesd.apply_patch`` with a ``ratio``.
        steps: Denoising steps, None for those of the evaluation.

    Raises:
        ToMeError: It is not installed, or there is no ratio in [0, 0.75], above which
            tomesd silently caps.
    """
    options = {"ratio": options} if isinstance(options, (int, float)) else options
    ratio = options.get("ratio") if isinstance(options, Mapping) else None
    if not isinstance(ratio, (int, float)):
        raise ToMeError(f"contender {name!r}: tomesd takes options such as dict(ratio=0.5)")
    cells = options.get("sx", 2) * options.get("sy", 2)
    if not 0 <= ratio <= 1 - 1 / cells:
        raise ToMeError(
            f"contender {name!r}: tomesd merges at most {1 - 1 / cells:g} of the tokens and "
            f"silently caps what is above, got {ratio!r}"
        )
    try:
        require_tomesd()
    except ToMeError as error:
        raise ToMeError(f"contender {name!r} needs tomesd, which is {error}") from None
    return Contender(name, tomesd=dict(options), steps=steps)


def deepcache_contender(name: str, options: Any, steps: int | None = None) -> Contender:
    """Return the PyPI package ``DeepCache`` as a contender.

    Args:
        name: Its name.
        options: Steps between two full ones, or options of ``DeepCacheSDHelper.set_params``.
        steps: Denoising steps, None for those of the evaluation.

    Raises:
        ToMeError: It is not installed, or no ``cache_interval`` of at least 1 is given.
    """
    options = {"cache_interval": options} if isinstance(options, int) else options
    interval = options.get("cache_interval") if isinstance(options, Mapping) else None
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ToMeError(
            f"contender {name!r}: DeepCache takes options such as "
            f"dict(cache_interval=3, cache_branch_id=0), got {options!r}"
        )
    try:
        require_deepcache()
    except ToMeError as error:
        raise ToMeError(f"contender {name!r} needs DeepCache, which is {error}") from None
    return Contender(name, deepcache=dict(options), steps=steps)


def fewer_steps(values, steps: int) -> list[Contender]:
    """Return dense contenders with fewer steps: what a user would do instead of merging.

    Args:
        values: Shares of the steps (below 1) or numbers of steps (1 and above).
        steps: Steps of the evaluation.

    Raises:
        ToMeError: A value that is not below ``steps``, or not above 0.
    """
    found = {}
    for value in values:
        count = max(1, round(value * steps)) if 0 < value < 1 else value
        if count != int(count) or count <= 0:
            raise ToMeError(f"fewer steps: {value!r} is neither a share nor a number of steps")
        if count >= steps:
            # A share of very few steps may round up to all of them, which is no contender.
            if value < 1:
                continue
            raise ToMeError(f"fewer steps: {value:g} is not fewer than the {steps} steps of dense")
        found[int(count)] = Contender(f"{int(count)} steps", steps=int(count))
    return list(found.values())


def check_names(contenders) -> None:
    """Raise :class:`ToMeError` if two contenders share a name, or a folder's name."""
    seen: dict[str, str] = {"real": "the real pictures"}
    for contender in contenders:
        other = seen.get(contender.folder)
        if other is not None:
            raise ToMeError(
                f"contender {contender.name!r} has the name of another ({other!r}) as a folder; "
                "give it one of its own"
            )
        seen[contender.folder] = contender.name
