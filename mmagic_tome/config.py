# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a user can ask for: one validated, immutable set of options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from .errors import ToMeError, did_you_mean, nearest
from .methods import Method, build_method
from .presets import with_preset
from .reuse import Reuse
from .schedules import RatioSchedule
from .temporal import Refresh, Residual

_MAX_CELL = 16
_SITES = ("attn", "attn_kv", "crossattn", "mlp", "block", "stack")


@dataclass(frozen=True)
class ToMeConfig:
    """Options of token merging; every key of MMagic's ``tomesd_cfg`` with the same meaning.

    Instances are immutable and valid: whatever can be found wrong without a
    model is found here. Use :meth:`replace` for a changed copy.

    Args:
        ratio (float | dict | callable): share of the tokens to remove at every site, in
            ``[0, 1 - 1 / (sx * sy)]``. 0 runs the dense model, bit for bit.
            Default 0.5. A dict or a callable gives each level, depth, site and
            noise level its own, see :class:`~mmagic_tome.schedules.RatioSchedule`.
        max_downsample (int | str): merge in blocks whose grid is at most this
            many times coarser than the latent: 1, 2, 4, 8 ... Default
            ``'auto'``: the finest level that has blocks (1 for Stable Diffusion
            1 and 2, 2 for SDXL), where attention costs most.
        sx, sy (int): width and height in tokens of the cells that get one
            destination each. Default 2.
        use_rand (bool): draw the destination of a cell at random, anew for
            every block and step (from ``seed``, never from a global generator);
            otherwise its top-left token. Default True.
        merge_attn (bool): merge around self-attention. Default True.
        merge_crossattn (bool): merge around cross-attention. Default False.
        merge_mlp (bool): merge around the feed-forward. Default False.
        seed (int): of the random destinations, non-negative. The same seed
            gives the same picture however often it is run. Default 0.
        exact_matching (bool): find every token's most similar destination in full
            precision, as the paper has it. Default False: on a CPU with fast 8-bit
            products the choice is made by them, three times as fast and to within half a
            per cent of similarity; no difference on any other device.
        method (str | dict): which tokens become one: a name out of
            :data:`mmagic_tome.methods.METHODS`, or a dict with the name as
            ``type`` and the method's own options. Default ``'tome'``. Or a dict that gives every
            kind of site one of these: ``dict(attn='todo', mlp='tome')``.
        sites (list of str | None): where to merge, in place of the three
            ``merge_`` options: of ``'attn'``, ``'attn_kv'`` (keys and values of
            self-attention only), ``'crossattn'``, ``'mlp'``, or alone ``'block'`` (once
            around every block) or ``'stack'`` (once around all blocks of a
            stack). Default None: what the ``merge_`` options say.
        refresh (int | dict | None): steps that a plan serves, or a dict of
            :class:`~mmagic_tome.temporal.Refresh`. Default None: a new plan at every step.
        residual (str | dict | None): what a merged site adds of its last dense
            output: ``'own'``, ``'exact'`` or ``'reuse'``, or a dict of
            :class:`~mmagic_tome.temporal.Residual`. Needs ``refresh`` of at least 2 steps.
            Default None.
        reuse (int | dict | None): leave out a part of the network at some steps and foretell its
            output from the last ones: 2 runs the network at every second step; or a dict of
            :class:`~mmagic_tome.reuse.Reuse`. Merges nothing by itself: with ``ratio=0`` it is
            all that is done. Default None.
        proportional (bool): self-attention attends to a merged token as often as to all that it
            stands for: softmax(Q K^T / sqrt(d) + log s), s the number of tokens (arXiv 2210.09461,
            section 3). Default False, as for Stable Diffusion in arXiv 2303.17604.
        controlnet (bool | dict): merge in the model's ControlNet too: True for the same options
            there, a dict of those that differ there. Default False: the UNet only.
        across_frames (bool): in video UNets that work frame by frame (AnimateDiff) merge the tokens
            of all frames of a clip together; self-attention then joins the frames, see
            :class:`~mmagic_tome.merging.frames.FramePlan`. Default False: frame by frame.

    Raises:
        ToMeError: wrong type or range; says the key, the value, what is
            allowed and the nearest valid setting.

    Source of the options: arXiv 2303.17604, sections 4 and 5.
    """

    ratio: Any = 0.5
    max_downsample: int | str = "auto"
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    seed: int = 0
    exact_matching: bool = False
    method: Any = "tome"
    sites: Any = None
    refresh: Any = None
    residual: Any = None
    reuse: Any = None
    controlnet: Any = False
    across_frames: bool = False
    proportional: bool = False

    def __post_init__(self) -> None:
        for key in ("ratio", "max_downsample", "sx", "sy", "seed", "refresh", "residual", "reuse"):
            # numpy scalars and the like are as good, and would not go into JSON.
            object.__setattr__(self, key, _plain_numbers(getattr(self, key)))
        switches = ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp", "exact_matching")
        for key in (*switches, "across_frames", "proportional"):
            if not isinstance(getattr(self, key), bool):
                _fail(key, getattr(self, key), "True or False", bool(getattr(self, key)))
        for key in ("sx", "sy"):
            value = getattr(self, key)
            if not _is_int(value) or not 1 <= value <= _MAX_CELL:
                nearest = _clip(value, 1, _MAX_CELL, 2)
                _fail(key, value, f"an integer in [1, {_MAX_CELL}]", nearest)
        if self.sx * self.sy < 2:
            raise ToMeError(
                "sx=1 and sy=1 make every token a destination and leave nothing to merge; "
                "write sx=2, sy=2"
            )
        self._build_methods()
        self._check_ratio()
        level = self.max_downsample
        powers = [2**i for i in range(8)]
        if level != "auto" and not (_is_int(level) and level in powers):
            nearest = min(powers, key=lambda p: abs(p - level)) if _is_number(level) else "auto"
            _fail("max_downsample", level, f"'auto' or one of {powers}", nearest)
        if not _is_int(self.seed) or not 0 <= self.seed < 2**64:
            _fail("seed", self.seed, "an integer in [0, 2**64)", _clip(self.seed, 0, 2**64 - 1, 0))
        self._check_sites()
        self._check_methods()
        self._check_temporal()
        if not (self.sites or self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ToMeError(
                "merge_attn, merge_crossattn and merge_mlp are all False, which merges nothing; "
                "write merge_attn=True (or ratio=0 for the dense model)"
            )
        self._check_across_frames()
        if self.proportional and not {"attn", "attn_kv"} & set(self.kinds):
            raise ToMeError(
                f"proportional=True weighs keys of self-attention, and what is merged is "
                f"{', '.join(self.kinds)}; write sites=['attn'], or proportional=False"
            )
        self._check_controlnet()

    def _build_methods(self) -> None:
        # Building a method checks its options; a method is stateless, so one serves all.
        spec = self.method
        by_site = isinstance(spec, Mapping) and "type" not in spec and set(spec) & set(_SITES)
        # What is named None is for all sites.
        named = spec if by_site else {None: spec}
        for site in named:
            if by_site and site not in _SITES:
                _fail("method", spec, f"by site, of {', '.join(_SITES)}", {"attn": "tome"})
        methods = tuple(map(build_method, named.values()))
        object.__setattr__(self, "_methods", methods)
        object.__setattr__(self, "_watches", any(method.watches_output for method in methods))
        by_step = any(method.tracks_steps or method.watches_output for method in methods)
        object.__setattr__(self, "_by_step", by_step)
        # Self-attention is one site to a user, whether its queries merge too or not.
        at = {"attn" if site == "attn_kv" else site: number for number, site in enumerate(named)}
        object.__setattr__(self, "_method_at", at)

    def _check_methods(self) -> None:
        """Where methods are named by site, the merged sites have to be those."""
        if None in self._method_at:
            return
        merged = dict.fromkeys("attn" if kind == "attn_kv" else kind for kind in self.kinds)
        named = list(self._method_at)
        if set(merged) != set(named):
            raise ToMeError(
                f"method={self.method!r} names methods for {', '.join(named)}, but what is merged "
                f"is {', '.join(merged)}; write sites={named!r}, or one method for all"
            )

    def _check_sites(self) -> None:
        if self.sites is None:
            return
        sites = [self.sites] if isinstance(self.sites, str) else self.sites
        if not isinstance(sites, (list, tuple)) or not sites:
            _fail("sites", self.sites, f"None or a list of {', '.join(_SITES)}", ["attn"])
        for site in sites:
            if site not in _SITES:
                close = nearest(site, _SITES) or "attn"
                _fail("sites", self.sites, f"a list of {', '.join(_SITES)}", [close])
        whole = [site for site in sites if site in ("block", "stack")]
        if whole and len(sites) > 1:
            raise ToMeError(
                f"sites={list(sites)!r}: {whole[0]!r} merges around everything inside it; write "
                f"sites={whole[:1]!r}, or leave it out"
            )
        if "attn" in sites and "attn_kv" in sites:
            raise ToMeError("sites: 'attn' includes the keys and values of 'attn_kv'; write one")
        # In the order in which a block runs them.
        object.__setattr__(self, "sites", [site for site in _SITES if site in sites])

    def _check_temporal(self) -> None:
        refresh, residual = Refresh.coerce(self.refresh), Residual.coerce(self.residual)
        object.__setattr__(self, "_refresh", refresh)
        object.__setattr__(self, "_residual", residual)
        reuse = Reuse.coerce(self.reuse)
        object.__setattr__(self, "_reuse", reuse)
        plain = self.reuse.to_dict() if isinstance(self.reuse, Reuse) else self.reuse
        object.__setattr__(self, "reuse", _as_lists(plain))
        for key in ("refresh", "residual"):
            object.__setattr__(self, key, _as_lists(getattr(self, key)))
        if residual is not None and not refresh.keeps:
            raise ToMeError(
                "residual needs steps between refreshes to be added at; write refresh=dict(steps=2)"
            )
        if residual is not None and residual.kind == "own" and "attn_kv" in self.kinds:
            raise ToMeError(
                "residual 'own' is what merging takes from a site's output, and 'attn_kv' merges "
                "no output; write residual='exact'"
            )

    def _check_across_frames(self) -> None:
        if not self.across_frames:
            return
        for kind, instead in (("attn_kv", "attn"), ("stack", "block")):
            if kind in self.kinds:
                raise ToMeError(
                    f"across_frames=True cannot merge at {kind!r}; write sites=[{instead!r}]"
                    + (" and another method than 'todo'" if self._keeps_queries else "")
                )

    def _check_controlnet(self) -> None:
        branch = self.controlnet
        if isinstance(branch, bool):
            return
        if not isinstance(branch, Mapping):
            _fail("controlnet", branch, "True, False or a dict of options for it", True)
        if "controlnet" in branch:
            raise ToMeError(
                "controlnet: a dict of its options has no 'controlnet' in it; leave out"
            )
        object.__setattr__(self, "controlnet", dict(branch))
        try:
            self.controlnet_config  # noqa: B018
        except ToMeError as error:
            raise ToMeError(f"controlnet: {error}") from error

    def _check_ratio(self) -> None:
        ratio, ceiling = self.ratio, self.ceiling
        if isinstance(ratio, Mapping) or callable(ratio):
            object.__setattr__(self, "_ratio", RatioSchedule(ratio, ceiling))
            return
        if not _is_number(ratio):
            _fail("ratio", ratio, f"a number in [0, {ceiling:g}]", 0.5)
        if ratio < 0:
            _fail("ratio", ratio, f"a number in [0, {ceiling:g}]", 0)
        if ratio > ceiling + 1e-9 and ceiling == min(m.ceiling for m in self.built_methods):
            raise ToMeError(
                f"ratio={ratio!r} is above the ceiling {ceiling:g} of method={self.method!r}. "
                f"Write ratio={ceiling:g}, or another method"
            )
        if ratio > ceiling + 1e-9:
            wider = ""
            if ratio < 1:
                for cell in range(2, _MAX_CELL + 1):
                    if 1 - 1 / cell**2 >= ratio:
                        wider = f", or wider cells (sx={cell}, sy={cell})"
                        break
            raise ToMeError(
                f"ratio={ratio!r} is above the ceiling 1 - 1 / (sx * sy) = {ceiling:g} for "
                f"sx={self.sx}, sy={self.sy}: one token of every cell must stay. "
                f"Write ratio={ceiling:g}{wider}"
            )
        object.__setattr__(self, "_ratio", RatioSchedule(ratio, ceiling))

    @property
    def ceiling(self) -> float:
        """Largest possible ratio, ``1 - 1 / (sx * sy)``: one token of every cell stays. Less
        where the method has a lower one."""
        return min(1 - 1 / (self.sx * self.sy), *(m.ceiling for m in self.built_methods))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of site to merge at, see ``sites``."""
        attn = "attn_kv" if self._keeps_queries else "attn"
        if self.sites:
            return tuple(attn if site == "attn" else site for site in self.sites)
        chosen = {
            attn: self.merge_attn,
            "crossattn": self.merge_crossattn,
            "mlp": self.merge_mlp,
        }
        return tuple(kind for kind, wanted in chosen.items() if wanted)

    @property
    def ratio_schedule(self) -> RatioSchedule:
        """``ratio`` as a function of place and noise level."""
        return self._ratio

    @property
    def built_methods(self) -> tuple[Method, ...]:
        """The methods that ``method`` names; as a rule one for all sites."""
        return self._methods

    def method_at(self, kind: str) -> int:
        """Which of :attr:`built_methods` a kind of site has."""
        if len(self._methods) == 1:
            return 0
        return self._method_at["attn" if kind == "attn_kv" else kind]

    @property
    def _keeps_queries(self) -> bool:
        """Whether the method of self-attention merges keys and values only."""
        number = self._method_at.get("attn", self._method_at.get(None))
        return number is not None and self._methods[number].keeps_queries

    @property
    def watches_output(self) -> bool:
        """Whether a method looks at what the network predicted last."""
        return self._watches

    @property
    def refresh_plan(self) -> Refresh:
        """``refresh`` with its defaults filled in."""
        return self._refresh

    @property
    def residual_plan(self) -> Residual | None:
        """``residual`` with its defaults filled in; None without one."""
        return self._residual

    @property
    def controlnet_config(self) -> ToMeConfig | None:
        """The options of the ControlNet; None where it is not merged."""
        if self.controlnet is False:
            return None
        own = {} if self.controlnet is True else self.controlnet
        reuse = self._reuse
        if reuse is not None and "reuse" not in own:
            # Its levels only go down: nothing is inside them.
            network = reuse.scopes.get("network")
            own = {**own, "reuse": None if network is None else {"network": network}}
        return self.replace(**{**own, "controlnet": False})

    @property
    def reuse_plan(self) -> Reuse | None:
        """``reuse`` with its defaults filled in; None without it."""
        return self._reuse

    @property
    def dense(self) -> bool:
        """Whether nothing is done at all."""
        return self._ratio.zero and self._residual is None and self._reuse is None

    @property
    def tracks_steps(self) -> bool:
        """Whether anything depends on the place of a step in its denoising run."""
        return self._reuse is not None or self.plans_by_step

    @property
    def plans_by_step(self) -> bool:
        """Whether what happens in a block does."""
        return self._refresh.keeps or self._ratio.needs_noise or self._by_step

    def replace(self, **changes: Any) -> ToMeConfig:
        """A changed, validated copy.

        Raises:
            ToMeError: as the constructor, and for unknown keys.
        """
        changes = with_preset(changes)
        _check_keys(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all options; inverse of :meth:`from_dict`, also by way of JSON, unless the
        ratio is a function, which stays one."""
        return _as_lists(asdict(self))

    def to_record(self) -> dict[str, Any]:
        """As :meth:`to_dict`, for what is only read: a function by name, so all goes into JSON."""
        options = self.to_dict()
        if callable(self.ratio):
            options["ratio"] = getattr(self.ratio, "__name__", type(self.ratio).__name__)
        return options

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ToMeConfig:
        """Config from a mapping (a dict, a mmengine ``ConfigDict`` ...); missing keys default.

        ``preset`` stands for the options of that name in :data:`mmagic_tome.presets.PRESETS`;
        what else is there wins over them, key by key in a dict beside a dict.

        Raises:
            ToMeError: not a mapping, unknown keys, or invalid values.
        """
        if not isinstance(options, Mapping):
            raise ToMeError(
                f"token merging options must be a dict such as dict(ratio=0.5), got {options!r}"
            )
        options = with_preset(options)
        _check_keys(options)
        return cls(**options)

    @classmethod
    def coerce(
        cls, config: ToMeConfig | Mapping[str, Any] | None = None, **changes: Any
    ) -> ToMeConfig:
        """Config from whatever a user passes: None, a mapping or a config; keywords win.

        Raises:
            ToMeError: as :meth:`from_dict`.
        """
        if isinstance(config, cls):
            return config.replace(**changes) if changes else config
        options = {} if config is None else config
        if not isinstance(options, Mapping):
            raise ToMeError(
                "token merging options must be a dict such as dict(ratio=0.5) or a ToMeConfig, "
                f"got {options!r}"
            )
        return cls.from_dict({**options, **changes})


def _check_keys(options: Mapping[str, Any]) -> None:
    known = [*(field.name for field in fields(ToMeConfig)), "preset"]
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ToMeError(
                f"unknown token merging option {key!r}: {hint}Known: {', '.join(known)}"
            )


def _fail(key: str, value: Any, allowed: str, nearest: Any) -> None:
    raise ToMeError(
        f"{key}={value!r} is not valid: {key} must be {allowed}; write {key}={nearest!r}"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A finite int or float; floats of absurd ints overflow and count as none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _as_lists(value: Any) -> Any:
    """The same with dicts for dataclasses and lists for tuples, also inside."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain_numbers(value: Any) -> Any:
    """The same as JSON would give it back, but with the levels as numbers: see
    :func:`_plain_number`, and lists for tuples."""
    if isinstance(value, Mapping):
        plain = {key: _plain_numbers(item) for key, item in value.items()}
        level = plain.get("level")
        if isinstance(level, Mapping):
            plain["level"] = {_level(key): ratio for key, ratio in level.items()}
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain_numbers(item) for item in value]
    return _plain_number(value)


def _level(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else _plain_number(key)


def _plain_number(value: Any) -> Any:
    """int or float for whatever is registered as such a number; anything else as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _clip(value: Any, low: int, high: int, default: int) -> int:
    return min(max(round(value), low), high) if _is_number(value) else default
