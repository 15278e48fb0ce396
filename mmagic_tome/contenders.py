# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the benchmark and the evaluation share about contenders.

How a setting under a name is spelled on a command line, and how the packages tomesd and
DeepCache, the references to beat, are put on a network.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from .errors import ToMeError
from .models import find_adapter
from .settings import Setting

TOMESD_VERSION = "0.1.3"
DEEPCACHE_VERSION = "0.1.1"


def parse_options(text: str) -> Any:
    """What a command line means by ``text``: JSON, a Python literal, or the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError):
            continue
    return text


def parse_named(
    text: str,
    taken: Collection[str] = (),
    check: Callable[[dict[str, Any]], object] = Setting.coerce,
) -> tuple[str, dict[str, Any]]:
    """``NAME={...}`` as (name, options of a :class:`Setting`); JSON or Python spelling.

    Args:
        text: value of an option ``--tome``.
        taken: names that cannot be given.
        check: raises ToMeError for options that are not valid.

    Raises:
        ToMeError: it is neither, or the options are not valid.
    """
    name, equals, options = text.partition("=")
    name = name.strip()
    if not equals or not name or name in taken or not options.strip():
        raise ToMeError(
            f"--tome takes NAME='{{\"ratio\": 0.5, ...}}' with a name of your own, got {text!r}"
        )
    given = parse_options(options)
    if not isinstance(given, dict):
        raise ToMeError(f"--tome {name}: expected a dict such as {{'ratio': 0.6}}, got {options!r}")
    try:
        check(given)
    except ToMeError as error:
        raise ToMeError(f"--tome {name}: {error}") from error
    return name, given


def require_tomesd() -> None:
    """Raise :class:`ToMeError` if the package tomesd is not installed."""
    if importlib.util.find_spec("tomesd") is None:
        raise ToMeError(f"not installed: pip install tomesd=={TOMESD_VERSION}")


def apply_tomesd(network: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Put the package tomesd on a network, to be taken off by ``tomesd.remove_patch``.

    Its generator of random destinations is made from torch's global one at the first forward.

    Args:
        network: a UNet of diffusers, or one in a wrapper, which tomesd itself does not know.
        options: keyword arguments of ``tomesd.apply_patch``.

    Returns:
        nn.Module: what was patched, the network out of its wrapper.
    """
    require_tomesd()
    import tomesd

    _, network = find_adapter(network)
    tomesd.apply_patch(network, **options)
    return network


def require_deepcache() -> None:
    """Raise :class:`ToMeError` if the package DeepCache is not installed."""
    if importlib.util.find_spec("DeepCache") is None:
        raise ToMeError(f"not installed: pip install --no-deps DeepCache=={DEEPCACHE_VERSION}")


def apply_deepcache(model: object, options: Mapping[str, Any]) -> Any:
    """Put the package DeepCache on a network.

    It counts steps by its place among the scheduler's timesteps, so it needs that too; MMagic's
    wrapper of schedulers is opened for it.

    Args:
        model: a pipeline or MMagic model: a diffusers UNet and a scheduler.
        options: keyword arguments of ``DeepCacheSDHelper.set_params``, such as
            ``dict(cache_interval=3, cache_branch_id=0)``.

    Returns:
        Its helper; ``disable()`` takes it off.
    """
    require_deepcache()
    from DeepCache import DeepCacheSDHelper

    _, network = find_adapter(model)
    scheduler = getattr(model, "test_scheduler", None) or model.scheduler
    helper = DeepCacheSDHelper(SimpleNamespace(unet=network, scheduler=scheduler))
    helper.set_params(**options)
    helper.enable()
    return helper
