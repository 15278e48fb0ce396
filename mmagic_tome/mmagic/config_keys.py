# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Reading token merging and step caching out of config keys, wherever they are."""

from ..apply import apply_cache, apply_tome
from ..cache import coerce_cache, to_plain
from ..config import ToMeConfig
from ..errors import ToMeError

#: Config key -> (what reads its value, what applies it, what shows it).
KEYS = {
    "tome_cfg": (ToMeConfig.coerce, apply_tome, ToMeConfig.to_dict),
    "cache_cfg": (coerce_cache, apply_cache, to_plain),
}

# Where a model keeps what its own config said, to compare it with the top level.
_RECORD = "_mmagic_tome_cfg"

# MMagic's switches -> targets.
_SWITCHES = {"merge_attn": "attn", "merge_crossattn": "crossattn", "merge_mlp": "mlp"}


def read(key, **sources):
    """The one value of a config key that several places of a config mean, or None.

    Args:
        key (str): One of :data:`KEYS`.
        **sources: Name of a place -> its value, or None where it is not there.

    Raises:
        ToMeError: An invalid value, naming the place; places that contradict each other.
    """
    coerce = KEYS[key][0]
    configs = {}
    for name, value in sources.items():
        if value is None:
            continue
        try:
            configs[name] = coerce(value)
        except ToMeError as error:
            raise ToMeError(f"{name}: {error}") from error
    (first, config), *others = configs.items() or [(None, None)]
    for name, other in others:
        _must_agree(key, first, config, name, other)
    return config


def translate_tomesd(options):
    """MMagic's own ``tomesd_cfg`` (dict | None) as options of :class:`mmagic_tome.ToMeConfig`."""
    if options is None or not hasattr(options, "items"):
        return options
    options = dict(options)
    switches = {key: options.pop(key, key == "merge_attn") for key in _SWITCHES}
    targets = tuple(target for key, target in _SWITCHES.items() if switches[key])
    if not targets:
        raise ToMeError(
            "tomesd_cfg: merge_attn, merge_crossattn and merge_mlp are all False, which merges "
            "nothing; write merge_attn=True (or ratio=0 for the baseline)"
        )
    if targets != ("attn",):
        options["targets"] = targets
    # It has no proportional attention; without, self-attention is merged as a whole.
    return {"prop_attn": False, **options}


def read_keys(options):
    """Key -> value of the keys in one place: a whole config (mmengine.Config | dict | None), or
    options of a model."""
    get = getattr(options, "get", lambda key: None)  # mmengine.Config is not a Mapping
    translated = translate_tomesd(get("tomesd_cfg"))
    found = {
        "tome_cfg": read("tome_cfg", tome_cfg=get("tome_cfg"), tomesd_cfg=translated),
        "cache_cfg": read("cache_cfg", cache_cfg=get("cache_cfg")),
    }
    return {key: config for key, config in found.items() if config is not None}


def apply_keys(model, configs, top_level=False):
    """Apply what :func:`read_keys` returned to the model that a config describes.

    ``top_level``: whether it is of the top level, where a later config replaces an earlier one.
    ToMeError if the model's own config has said something else.
    """
    own = model.__dict__.get(_RECORD, {})
    place = "at the top level" if top_level else "of type='ToMe'"
    for key, config in configs.items():
        if key in own:
            _must_agree(key, f"{key} of the model", own[key], f"{key} {place}", config)
        else:
            KEYS[key][1](model, config)
    if configs and not top_level:
        # Past nn.Module.__setattr__: plain data.
        model.__dict__[_RECORD] = {**configs, **own}


def _must_agree(key, first, config, second, other):
    if config == other or (key == "tome_cfg" and config.resolved() == other.resolved()):
        return
    show = KEYS[key][2]
    theirs, ours = show(config), show(other)
    if isinstance(theirs, dict):
        differing = [name for name in theirs if theirs[name] != ours[name]]
        theirs, ours = ({name: one[name] for name in differing} for one in (theirs, ours))
    technique = "token merging" if key == "tome_cfg" else "step caching"
    raise ToMeError(
        f"{technique} is configured twice and differently ({first}: {theirs!r}; "
        f"{second}: {ours!r}); keep one"
    )
