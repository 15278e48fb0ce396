# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""One setting of a model: token merging, step caching, both or neither, as one dict has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .apply import apply_cache, apply_tome, get_handle
from .cache import PRESETS, StepCacheConfig, coerce_cache, to_plain
from .config import ToMeConfig
from .errors import ToMeError
from .handle import CacheHandle, ToMeHandle


@dataclass(frozen=True)
class Handles:
    """What a setting has applied to a model; None for a technique that it does not use."""

    tome: ToMeHandle | None = None
    cache: CacheHandle | None = None

    @classmethod
    def of(cls, model: object) -> Handles:
        """Those of what is applied to a model."""
        return cls(get_handle(model, "tome"), get_handle(model, "cache"))

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def __iter__(self) -> Iterator[ToMeHandle | CacheHandle]:
        return iter([handle for handle in (self.tome, self.cache) if handle is not None])

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The baseline model, bit for bit, for calls in this thread while entered."""
        with contextlib.ExitStack() as stack:
            for handle in self:
                stack.enter_context(handle.disabled())
            yield

    def reset_run(self) -> None:
        """Forget what is kept between steps."""
        for handle in self:
            handle.reset_run()

    def reset_stats(self) -> None:
        """Set all counters back to zero."""
        for handle in self:
            handle.reset_stats()


@dataclass(frozen=True)
class Setting:
    """What is applied to a model."""

    tome: ToMeConfig | None = None  #: options of token merging; None merges nothing
    cache: tuple[StepCacheConfig, ...] | None = None  #: the step caches; None skips nothing

    @classmethod
    def coerce(cls, spec: Any) -> Setting:
        """The setting that a user means.

        Args:
            spec: options of :class:`ToMeConfig` as a dict, plus the optional key ``cache`` with
                whatever ``apply_cache`` takes as config. A dict without options of token merging
                merges nothing. Or a :class:`ToMeConfig`, a Setting, or None for neither.

        Raises:
            ToMeError: anything else; invalid options.

        Example:
            >>> Setting.coerce({"ratio": 0.5, "prop_attn": True, "cache": "balanced"})
        """
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, ToMeConfig):
            return cls(tome=spec)
        if spec is not None and not isinstance(spec, Mapping):
            raise ToMeError(
                f"a setting must be a dict such as dict(ratio=0.5, cache='balanced'), got {spec!r}"
            )
        return cls().replace(**(spec or {}))

    @property
    def baseline(self) -> bool:
        """Whether it leaves the model as it is."""
        return self == Setting()

    @property
    def description(self) -> str:
        """The ratio and the options that are not the default, or 'baseline'."""
        words = [] if self.tome is None else [self.tome.description]
        if self.cache is not None:
            name = next((name for name, one in PRESETS.items() if one == self.cache), None)
            words += [f"cache={name!r}"] if name else [one.description for one in self.cache]
        return ", ".join(words) or "baseline"

    def replace(self, **changes: Any) -> Setting:
        """A changed, validated copy: options of token merging, or ``cache``, None for no step
        caching."""
        cache = changes.pop("cache", self.cache)
        tome = ToMeConfig.coerce(self.tome, **changes) if changes else self.tome
        return type(self)(tome, None if cache is None else coerce_cache(cache))

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all options, as JSON has them unless the ratio is a function;
        :meth:`coerce` is the inverse."""
        options = {} if self.tome is None else self.tome.to_dict()
        return options if self.cache is None else {**options, "cache": to_plain(self.cache)}

    @contextlib.contextmanager
    def apply(self, model: object) -> Iterator[Handles]:
        """Apply both to whatever ``apply_tome`` takes, vision transformers aside; on exit the model
        is what it was.

        Raises:
            ToMeError: the model has nothing to merge or to skip; nothing is changed then.
        """
        with contextlib.ExitStack() as stack:
            tome = cache = None
            if self.tome is not None:
                tome = stack.enter_context(apply_tome(model, self.tome))
            if self.cache is not None:
                cache = stack.enter_context(apply_cache(model, self.cache))
            yield Handles(tome, cache)
