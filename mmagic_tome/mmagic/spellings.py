# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Reading token merging out of config keys, wherever they stand."""

from ..config import ToMeConfig
from ..engine import apply_tome
from ..errors import ToMeError

__all__ = ["apply_model_level", "apply_top_level", "read"]

# Where a model keeps what its own config said, to compare it with the top level.
_RECORD = "_tome_cfg"


def read(**keys):
    """The one config that several keys of a config mean.

    Args:
        **keys: Name of a config key -> its value: a dict of :class:`ToMeConfig` options
            (or a :class:`ToMeConfig`), or None for a key that is not there.

    Returns:
        ToMeConfig | None: None if no key is there.

    Raises:
        ToMeError: An invalid value, naming the key; keys that contradict each other.
    """
    configs = {}
    for key, value in keys.items():
        if value is None:
            continue
        try:
            configs[key] = ToMeConfig.coerce(value)
        except ToMeError as error:
            raise ToMeError(f"{key}: {error}") from error
    (first, config), *others = configs.items() or [(None, None)]
    for key, other in others:
        _must_agree(first, config, key, other)
    return config


def apply_model_level(model, config):
    """Apply what the model's own config said; None leaves the model untouched."""
    if config is not None:
        apply_tome(model, config)
        model.__dict__[_RECORD] = config  # past nn.Module.__setattr__: plain data


def apply_top_level(model, cfg):
    """Apply the key ``tome_cfg`` of a whole config, if there is one.

    Args:
        model (nn.Module): The model that was built from it.
        cfg (mmengine.Config | dict | None): The whole config.

    Raises:
        ToMeError: An invalid value; another one in the model's own config.
    """
    config = read_top_level(cfg)
    if config is None:
        return
    own = model.__dict__.get(_RECORD)
    if own is None:
        apply_tome(model, config)
    else:
        _must_agree("tome_cfg of the model", own, "tome_cfg at the top level", config)


def read_top_level(cfg):
    """``tome_cfg`` of a whole config as :class:`ToMeConfig`; None if it has none."""
    get = getattr(cfg, "get", None)  # mmengine.Config is not a Mapping
    return read(tome_cfg=get("tome_cfg")) if get is not None else None


def _must_agree(first, config, second, other):
    if config != other:
        theirs, ours = config.to_dict(), other.to_dict()
        differing = [key for key in theirs if theirs[key] != ours[key]]
        say = "; ".join(
            f"{name}: dict({', '.join(f'{key}={options[key]!r}' for key in differing)})"
            for name, options in ((first, theirs), (second, ours))
        )
        raise ToMeError(f"token merging is configured twice and differently ({say}); keep one")
