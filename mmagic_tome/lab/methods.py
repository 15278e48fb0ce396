# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is compared: the baseline, settings of this package, tomesd, DeepCache, fewer steps."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from .. import remove_cache, remove_tome
from ..errors import ToMeError
from ..methods import METHODS
from ..methods.base import REMOVED
from ..models import find_adapter
from ..settings import Handles, Setting
from ..validate import check_integer, check_keys, check_number
from ..version import __version__

# What a config's entry and the command line may say besides options of a setting.
KEYS = ("name", "tome_cfg", "cache_cfg", "tomesd", "deepcache", "steps")
_WAYS = ("setting", "tomesd", "deepcache", "function")
_INSTALL = {"tomesd": "tomesd==0.1.3", "DeepCache": "--no-deps DeepCache==0.1.1"}
# WORD:VALUE on the command line -> name of the method, key of its entry.
_SHORT = {
    "cache": ("{}", "cache_cfg"),
    "tomesd": ("tomesd {}", "tomesd"),
    "deepcache": ("DeepCache {}", "deepcache"),
    "steps": ("{} steps", "steps"),
}


@dataclass(frozen=True)
class Method:
    """A way of running a model: at most one of the four below but for ``steps``.

    Args:
        name: Unique in a comparison; appears in tables and plots.
        setting: This package's token merging, step caching or both.
        tomesd: Options of ``tomesd.apply_patch``, or a ratio.
        deepcache: Options of ``DeepCacheSDHelper.set_params``, or the interval.
        steps: Denoising steps. Default: None, those of the request.
        function: Takes a model and returns a context manager, inside of which the model is changed
            in some other way.

    Raises:
        ToMeError: Options that exclude each other or have a wrong value; a package that is not
            installed.

    Example:
        >>> with Method("ratio 0.5", Setting.coerce({"ratio": 0.5})).on(pipeline) as handles:
        ...     pipeline("a red apple")
    """

    name: str
    setting: Setting | None = field(default=None, hash=False)
    tomesd: Mapping[str, Any] | None = field(default=None, hash=False)
    deepcache: Mapping[str, Any] | None = field(default=None, hash=False)
    steps: int | None = None
    function: Callable[[Any], AbstractContextManager] | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ToMeError(f"a method needs a name, got {self.name!r}; write name='ratio 0.5'")
        ways = [way for way in _WAYS if getattr(self, way) is not None]
        if len(ways) > 1:
            raise ToMeError(f"method {self.name!r} has {' and '.join(ways)}; write two methods")
        where = f"method {self.name!r}: "
        if self.steps is not None:
            check_integer(where, "steps", self.steps, 1)
        if self.tomesd is not None:
            options = self._of_package("tomesd", self.tomesd, "ratio")
            # It caps larger ratios without a word.
            most = 1 - 1 / (options.get("sx", 2) * options.get("sy", 2))
            check_number(where, "ratio", options.get("ratio"), 0, most, 0.5)
            object.__setattr__(self, "tomesd", options)
        if self.deepcache is not None:
            options = self._of_package("DeepCache", self.deepcache, "cache_interval")
            check_integer(where, "cache_interval", options.get("cache_interval"), 1, default=3)
            object.__setattr__(self, "deepcache", options)

    def _of_package(self, package: str, given: Any, key: str) -> dict[str, Any]:
        """Options of a package; the value of ``key`` may be alone."""
        if importlib.util.find_spec(package) is None:
            raise ToMeError(
                f"method {self.name!r} needs {package}, which is not installed: "
                f"pip install {_INSTALL[package]}"
            )
        return dict(given) if isinstance(given, Mapping) else {key: given}

    @property
    def kind(self) -> str:
        """'baseline', 'ours', 'tomesd', 'deepcache', 'function' or 'fewer steps'."""
        if self.setting is not None and not self.setting.baseline:
            return "ours"
        for way in _WAYS[1:]:
            if getattr(self, way) is not None:
                return way
        return "baseline" if self.steps is None else "fewer steps"

    @property
    def label(self) -> str:
        """What is done to the model, in words: 'merging', 'merging and caching', '13 steps' ..."""
        if self.kind == "ours":
            both = {"merging": self.setting.tome, "caching": self.setting.cache}
            return " and ".join(name for name, one in both.items() if one is not None)
        if self.kind == "fewer steps":
            return f"{self.steps} steps"
        return {"deepcache": "DeepCache", "function": self.name}.get(self.kind, self.kind)

    @property
    def slug(self) -> str:
        """The name of its folder: lower-case letters, digits, dots and dashes."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "method"

    def to_dict(self) -> dict[str, Any]:
        """Everything that its images depend on besides the request, as JSON has it; functions by
        name."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind, "label": self.label}
        if self.kind == "ours":
            options = self.setting.to_dict()
            found["cache_cfg"] = options.pop("cache", None)
            found["tome_cfg"] = options or None
            found["mmagic_tome"] = __version__
        elif self.tomesd is not None:
            found.update(tomesd=self.tomesd, tomesd_version=metadata.version("tomesd"))
        elif self.deepcache is not None:
            found.update(deepcache=self.deepcache, deepcache_version=metadata.version("DeepCache"))
        elif self.function is not None:
            found["function"] = self.function
        found["steps"] = self.steps
        return json.loads(json.dumps(found, default=_name_of))

    @contextmanager
    def on(self, model: Any) -> Iterator[Handles]:
        """Apply it to whatever ``apply_tome`` takes, in place of anything this package applied
        before; yields the handles. On exit the model is the baseline.

        Raises:
            ToMeError: It cannot be applied to this model.
        """
        remove_tome(model)
        remove_cache(model)
        if self.tomesd is not None:
            context = _with_tomesd(model, self.tomesd)
        elif self.deepcache is not None:
            context = _with_deepcache(model, self.deepcache)
        elif self.function is not None:
            context = self.function(model)
        else:
            context = (self.setting or Setting()).apply(model)
        with context as applied:
            yield applied if isinstance(applied, Handles) else Handles()

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Method:
        """The method that an entry of a config means.

        It has ``name`` and one or more of ``tome_cfg`` (options of token merging, which may have
        the key ``cache``; an empty dict merges by default options), ``cache_cfg``, ``tomesd``,
        ``deepcache``, ``steps``.

        Raises:
            ToMeError: A wrong entry, named.
        """
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ToMeError(
                f"a method is a dict such as dict(name='half', tome_cfg=dict(ratio=0.5)), "
                f"got {entry!r}"
            )
        name = entry["name"]
        check_keys(f"method {name!r}", entry, KEYS)
        given = {key: value for key, value in entry.items() if value is not None}
        if set(given) == {"name"}:
            raise ToMeError(f"method {name!r} is empty; give it one of {', '.join(KEYS[1:])}")
        try:
            setting = _setting(given.pop("tome_cfg", None), given.pop("cache_cfg", None))
        except ToMeError as error:
            raise ToMeError(f"method {name!r}: {error}") from None
        if setting is not None and setting.baseline:
            raise ToMeError(
                f"method {name!r} neither merges nor skips anything; write "
                "tome_cfg=dict(ratio=0.5) or cache_cfg='balanced'"
            )
        return cls(setting=setting, **given)


#: The model as it is.
BASELINE = Method("baseline")


def predicted_errors(handles: Handles, count: int) -> list[float | None]:
    """The relative error of the final latents that step caching with a tolerance predicted in the
    last run, of each of its images; None where it is not known: without a tolerance, or where the
    images were made one after the other."""
    predicted = handles.cache and handles.cache.predicted_error
    if predicted == []:  # nothing was skipped
        return [0.0] * count
    return predicted if predicted and len(predicted) == count else [None] * count


def _setting(tome: Any, cache: Any) -> Setting | None:
    if tome is None and cache is None:
        return None
    if isinstance(tome, Mapping) and not tome:
        tome = {"ratio": 0.5}
    setting = Setting.coerce(tome)
    if cache is None:
        return setting
    if setting.cache is not None:
        raise ToMeError("has both cache_cfg and tome_cfg=dict(cache=...); keep one")
    return setting.replace(cache=cache)


def _name_of(value: Any) -> str:
    """How JSON names a function or an object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


# --- other packages -------------------------------------------------------------------------------


@contextmanager
def _with_tomesd(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """tomesd, whose generator is made from torch's global one at the first forward: anew each time,
    so that the same seed makes the same image."""
    import tomesd

    network = find_adapter(model)[1]  # tomesd itself does not look into wrappers
    tomesd.apply_patch(network, **options)
    try:
        yield
    finally:
        tomesd.remove_patch(network)


@contextmanager
def _with_deepcache(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """DeepCache, which finds the number of a step by its timestep's place in the scheduler."""
    from DeepCache import DeepCacheSDHelper

    scheduler = getattr(model, "test_scheduler", None) or getattr(model, "scheduler", None)
    if scheduler is None:
        raise ToMeError(
            f"DeepCache needs a scheduler, which a {type(model).__name__} does not have; pass the "
            "pipeline"
        )
    network = find_adapter(model)[1]
    helper = DeepCacheSDHelper(SimpleNamespace(unet=network, scheduler=scheduler))
    helper.set_params(**options)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


# --- the command line -----------------------------------------------------------------------------


def parse_method(text: str) -> Method:
    """The method that a command line means.

    Args:
        text: ``NAME={...}``: options of token merging and the keys ``cache``, ``steps``,
            ``tomesd``, ``deepcache``, as Python or JSON. Or one of ``METHOD:RATIO`` (``tome:0.5``,
            ``todo:0.75``), ``cache:PRESET``, ``tolerance:ERROR``, ``tomesd:RATIO``,
            ``deepcache:INTERVAL``, ``steps:N``, ``baseline``.

    Raises:
        ToMeError: Neither of these; options that are not valid.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        return _short(text.strip())
    options = _literal(value)
    if not name or not isinstance(options, dict):
        raise ToMeError(
            f"--method takes NAME=\"{{'ratio': 0.5, 'cache': 'balanced'}}\" or tome:0.5, "
            f"got {text!r}"
        )
    entry = {key: options.pop(key) for key in KEYS[1:] if key in options}
    if options:
        entry["tome_cfg"] = {**entry.get("tome_cfg", {}), **options}
    return Method.from_dict({"name": name, **entry})


def _short(text: str) -> Method:
    if text == BASELINE.name:
        return BASELINE
    word, _, value = text.partition(":")
    value = _literal(value)
    if word == "tolerance":
        return Method.from_dict({"name": f"tolerance {value}", "cache_cfg": {word: value}})
    if word in _SHORT:
        name, key = _SHORT[word]
        return Method.from_dict({"name": name.format(value), key: value})
    if word in METHODS or word in REMOVED:  # whose error says what to write
        name = f"ratio {value}" if word == "tome" else f"{word} {value}"
        return Method.from_dict({"name": name, "tome_cfg": {"method": word, "ratio": value}})
    raise ToMeError(
        f"--method {text!r} is not known; write tome:0.5, cache:balanced, tolerance:0.01, "
        "tomesd:0.5, deepcache:3, steps:13, or NAME=\"{'ratio': 0.5}\""
    )


def _literal(text: str) -> Any:
    """JSON, a Python literal, or the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError):
            continue
    return text


def fewer_steps(values: Iterable[float], steps: int) -> list[Method]:
    """The baseline with fewer steps: the alternative that every method has to beat.

    Args:
        values: Shares of the steps (below 1) or numbers of steps (1 and above).
        steps: Of the baseline.

    Raises:
        ToMeError: A value that is not above 0, or not below ``steps``.
    """
    found = {}
    for value in values:
        count = max(1, round(value * steps)) if 0 < value < 1 else value
        if count != int(count) or count <= 0:
            raise ToMeError(f"fewer steps: {value!r} is neither a share nor a number of steps")
        if count < steps:
            found[int(count)] = Method(f"{int(count)} steps", steps=int(count))
        elif value >= 1:  # a share of very few steps may round up to all of them
            raise ToMeError(
                f"fewer steps: {value:g} is not fewer than the {steps} steps of the baseline"
            )
    return list(found.values())


def check_names(methods: Iterable[Method]) -> None:
    """Raise :class:`ToMeError` if two methods share a name, or the name of a folder."""
    seen: dict[str, str] = {}
    for method in methods:
        if method.slug in seen:
            raise ToMeError(
                f"the methods {seen[method.slug]!r} and {method.name!r} would share the folder "
                f"{method.slug!r}; rename one"
            )
        seen[method.slug] = method.name
