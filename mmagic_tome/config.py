# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a user can ask of token merging: one validated, immutable set of options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .errors import ToMeError
from .methods import build_method
from .schedules import SELF_ATTENTION, TARGETS, RatioSchedule
from .validate import (
    Options,
    check_bool,
    check_integer,
    fail,
    frozen,
    is_number,
    nearest,
    plain,
)

_MAX_CELL = 16
_LEVELS = tuple(2**i for i in range(8))


@dataclass(frozen=True, init=False)
class ToMeConfig(Options):
    """Options of token merging: immutable, hashable, valid as far as can be said without a model.

    Args:
        ratio (float | dict | callable): share of the tokens to remove at every target, in
            ``[0, 1 - 1 / (sx * sy)]``: by default up to 0.9375. 0 is the baseline, bit for bit.
            Default 0.5. A dict or a callable gives another ratio to each resolution level, depth,
            target and part of the run, see :class:`~mmagic_tome.schedules.RatioSchedule`.
        targets (str | sequence of str): what to merge around. Of ``'attn'`` (self-attention),
            ``'attn_kv'`` (its keys and values only), ``'crossattn'``, ``'mlp'`` (feed-forward); or
            ``'block'`` alone (once around every transformer block), or ``'stack'`` alone (once
            around all blocks of a stack). Default ``'auto'``: the keys and values of
            self-attention; all of it where that is not possible, ``across_frames``, and with
            ``prop_attn=False``.
        method (str | dict): which tokens become one: a name out of
            :data:`mmagic_tome.methods.METHODS`, or a dict with the name as ``type`` and the
            method's own options. Default ``'tome'``.
        max_downsample (int | str): merge in blocks whose grid is at most this many times coarser
            than the latent: 1, 2, 4, 8 ... Default ``'auto'``: the finest level that has blocks (1
            for Stable Diffusion 1 and 2, 2 for SDXL), where attention costs most.
        sx, sy (int | str): width and height in tokens of the cells that get one destination each.
            Default ``'auto'``: 4 where keys and values alone are merged, since fewer destinations
            take less time to match; otherwise 2, as in the paper. Never more than the grid has.
        use_rand (bool): draw the destination of a cell at random, anew for every block and step
            (a hash of ``seed``, never a global generator); otherwise its top-left token. Default
            True.
        seed (int): of the random destinations, non-negative. The same seed gives the same image
            however often it is run. Default 0.
        exact_matching (bool): find every token's most similar destination in full precision.
            Default False: a CPU with fast 8-bit products chooses by them, three times as fast and
            to within half a per cent of similarity; no difference on any other device.
        prop_attn (bool | str): proportional attention: softmax(Q K^T / sqrt(d) + log s), where s is
            the number of tokens that a key represents (arXiv 2210.09461, section 3). Default
            ``'auto'``: wherever self-attention merges and takes weights; True is an error where it
            does not take any. False is arXiv 2303.17604, and equals tomesd.
        plan_interval (int | sequence of int): compute a new merge plan at every this many steps
            and reuse it in between; or the numbers of the steps that compute one, 0 being the first
            (arXiv 2501.00946). Default 1.
        controlnet (bool | dict): merge in the model's ControlNet too: True for the same options
            there, a dict of those that differ. Default False.
        across_frames (bool): in video UNets that work frame by frame (AnimateDiff) merge the tokens
            of all frames of a clip together, see :class:`~mmagic_tome.merging.frames.FramePlan`.
            Default False.

    Raises:
        ToMeError: an unknown option, a wrong type or range.

    Source of the options: arXiv 2303.17604, sections 4 and 5.
    """

    ratio: Any = 0.5
    targets: Any = "auto"
    method: Any = "tome"
    max_downsample: Any = "auto"
    sx: Any = "auto"
    sy: Any = "auto"
    use_rand: bool = True
    seed: int = 0
    exact_matching: bool = False
    prop_attn: Any = "auto"
    plan_interval: Any = 1
    controlnet: Any = False
    across_frames: bool = False

    _what, _example = "token merging", "dict(ratio=0.5)"
    _note = ". A named setting is a step cache: call apply_cache"
    # Names that belong elsewhere -> what to write.
    _elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("r", "target_speedup"),
            "that is for vision transformers; for diffusion models write ratio=0.5",
        ),
        "timestep_range": "write ratio=dict(base=0.5, timestep=dict(timestep_range=(0.3, 1)))",
        **dict.fromkeys(
            ("preset", "reuse", "cache", "tolerance", "interval", "region"),
            "step caching has options of its own; write cache_cfg='balanced' or "
            "cache_cfg=dict(tolerance=0.01), or call apply_cache (in a --method: "
            "'cache': {'tolerance': 0.01})",
        ),
        **dict.fromkeys(
            ("merge_attn", "merge_crossattn", "merge_mlp", "sites"),
            "write targets, such as targets=['attn', 'mlp']",
        ),
        "share_plans": "plans of one block are no longer used by others: it saves hardly any time "
        "and loses much detail; write plan_interval=2 to reuse each block's own",
        "residual": "merging with a residual is no longer offered: merging keys and values alone, "
        "the default, is as close to the baseline at the same speed; leave it out",
    }

    def _check(self) -> None:
        for name, value in super().to_dict().items():
            self._set(name, frozen(value))
        for field in fields(self):
            if isinstance(field.default, bool) and field.name != "controlnet":
                check_bool("", field.name, getattr(self, field.name))
        for name in ("sx", "sy"):
            if getattr(self, name) != "auto":
                self._set(name, check_integer("", name, getattr(self, name), 1, _MAX_CELL, 2))
        if self.prop_attn != "auto" and not isinstance(self.prop_attn, bool):
            fail("", "prop_attn", self.prop_attn, "True, False or 'auto'", "auto")
        if self.sx == self.sy == 1:
            raise ToMeError(
                "sx=1 and sy=1 make every token a destination and leave nothing to merge; write "
                "sx=2, sy=2"
            )
        self._set("seed", check_integer("", "seed", self.seed, 0, 2**64 - 1, 0))
        level = self.max_downsample
        if level != "auto" and not (type(level) is int and level in _LEVELS):
            close = min(_LEVELS, key=lambda one: abs(one - level)) if is_number(level) else "auto"
            fail("", "max_downsample", level, f"'auto' or one of {list(_LEVELS)}", close)
        # Building a method checks its options; a method is stateless, so one serves all.
        #: The method that ``method`` names.
        self._set("merge_method", build_method(self.method))
        self._check_targets()
        self._set_kinds()
        self._check_ratio()
        self._check_plan_interval()
        self._check_together()
        self._derive()
        self._check_controlnet()

    def _check_ratio(self) -> None:
        ratio, (sx, sy) = self.ratio, self.cell
        cells = 1 - 1 / (sx * sy)
        ceiling = min(cells, self.merge_method.ceiling)
        #: Largest possible ratio: one token of every cell stays; less where the method has less.
        self._set("ceiling", ceiling)
        if not (isinstance(ratio, Mapping) or callable(ratio)):
            if not is_number(ratio) or ratio < 0:
                allowed = f"a number in [0, {ceiling:g}]"
                fail("", "ratio", ratio, allowed, 0 if is_number(ratio) else 0.5)
            if ratio > ceiling + 1e-9:
                why, other = f"of method={self.method!r}", "another method"
                if ceiling == cells:
                    why = f"of sx={sx}, sy={sy}, since one token of every cell stays"
                    other = "wider cells"
                raise ToMeError(
                    f"ratio={ratio!r} is above the ceiling {ceiling:g} {why}; write "
                    f"ratio={ceiling:g}, or {other}"
                )
        #: ``ratio`` as a function of place and remaining share of the run.
        self._set("ratio_schedule", RatioSchedule(ratio, ceiling))

    def _check_targets(self) -> None:
        given = self.targets
        if given == "auto":
            return
        targets = (given,) if isinstance(given, str) else given
        if not isinstance(targets, tuple) or not targets:
            targets = (None,)
        for target in targets:
            if target not in TARGETS:
                close = nearest(target, TARGETS) or "attn"
                known = f"'auto' or a list of {', '.join(TARGETS)}"
                fail("", "targets", plain(given), known, [close])
        whole = [target for target in targets if target in ("block", "stack")]
        if whole and len(targets) > 1:
            raise ToMeError(
                f"targets={list(targets)!r}: {whole[0]!r} merges around everything inside it; "
                f"write targets={whole[:1]!r}, or leave it out"
            )
        if set(SELF_ATTENTION) <= set(targets):
            raise ToMeError("targets: 'attn' includes the keys and values of 'attn_kv'; write one")
        # In the order in which a block runs them.
        self._set("targets", tuple(target for target in TARGETS if target in targets))

    def _set_kinds(self) -> None:
        targets = self.targets
        if targets == "auto":
            # Keys and values that are not weighed are no closer to the baseline than all of it.
            whole = self.across_frames or self.prop_attn is False
            targets = ("attn",) if whole else SELF_ATTENTION
        if self.merge_method.keeps_queries:
            targets = dict.fromkeys("attn_kv" if one == "attn" else one for one in targets)
        #: Kinds of target to merge at. Where both are named a block has 'attn_kv' if it can.
        self._set("kinds", tuple(targets))
        keys_alone = "attn_kv" in self.kinds and set(self.kinds) <= set(SELF_ATTENTION)
        #: Width and height of the largest cells, in tokens; see :meth:`cell_of`.
        self._set("cell", self._cell(keys_alone))

    def _check_plan_interval(self) -> None:
        interval = self.plan_interval
        if not isinstance(interval, tuple):
            self._set("plan_interval", check_integer("", "plan_interval", interval, 1))
            return
        if not interval or not all(type(one) is int and one >= 0 for one in interval):
            allowed = "a number of steps or a list of step numbers (0 is the first)"
            fail("", "plan_interval", plain(interval), allowed, [0, 8, 11, 13, 20])
        self._set("plan_interval", tuple(sorted(set(interval))))

    def _check_together(self) -> None:
        kinds, keeps_queries = self.kinds, self.merge_method.keeps_queries
        if self.prop_attn is True and not set(SELF_ATTENTION) & set(kinds):
            raise ToMeError(
                f"prop_attn=True weighs keys of self-attention, and targets are "
                f"{', '.join(kinds)}; write targets=['attn'], or prop_attn=False"
            )
        for kind, instead in (("attn_kv", "attn"), ("stack", "block")):
            if self.across_frames and kind in kinds:
                raise ToMeError(
                    f"across_frames=True cannot merge at {kind!r}; write targets=[{instead!r}]"
                    + (" and another method than 'todo'" if keeps_queries else "")
                )

    def _check_controlnet(self) -> None:
        own, config = self.controlnet, None
        if not isinstance(own, (bool, Mapping)):
            fail("", "controlnet", own, "True, False or a dict of options for it", True)
        if own is not False:
            changes = {} if own is True else own
            if "controlnet" in changes:
                raise ToMeError("controlnet: a dict of its options has no 'controlnet'")
            try:
                config = self.replace(**changes, controlnet=False)
            except ToMeError as error:
                raise ToMeError(f"controlnet: {error}") from error
        #: The options of the ControlNet; None where it is not merged.
        self._set("controlnet_config", config)

    def _derive(self) -> None:
        """What follows from the options: computed once, read at every call of a network."""
        schedule = self.ratio_schedule
        #: Whether plans are reused.
        self._set("keeps_plans", self.plan_interval != 1)
        #: Whether anything depends on the place of a step in its denoising run.
        by_step = self.keeps_plans or schedule.needs_timestep
        self._set("tracks_steps", by_step)
        #: Whether nothing is ever merged.
        self._set("merges_nothing", schedule.zero)
        #: Whether every target of a block has the same plan, made anew at each step.
        self._set("one_plan", schedule.constant and not self.keeps_plans)

    def _cell(self, keys_alone: bool) -> tuple[int, int]:
        usual = 4 if keys_alone else 2
        return tuple(usual if one == "auto" else one for one in (self.sx, self.sy))

    def cell_of(self, height: int, width: int, kinds: tuple[str, ...]) -> tuple[int, int]:
        """Width and height of the cells of a grid of so many tokens, for a block that is merged at
        these kinds of target."""
        sx, sy = self._cell(kinds == ("attn_kv",))
        return (
            min(sx, width) if self.sx == "auto" else sx,
            min(sy, height) if self.sy == "auto" else sy,
        )

    def resolved(self) -> ToMeConfig:
        """The same options with what ``sx='auto'`` and ``sy='auto'`` mean."""
        sx, sy = self.cell
        return self.replace(sx=sx, sy=sy)

    def plan_is_due(self, last: int, step: int) -> bool:
        """Whether a plan that was computed at step ``last`` (-1: never) is due at ``step``; also
        for a step in between at which its block did not run."""
        interval = self.plan_interval
        if last < 0:
            return True
        if isinstance(interval, tuple):
            return any(last < one <= step for one in interval)
        return step // interval > last // interval

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all options, as JSON has them unless the ratio is a function, which stays
        one; :meth:`coerce` is the inverse."""
        return plain(super().to_dict())

    @property
    def description(self) -> str:
        """The ratio and the options that are not the default, as ``name=value, ...``."""
        usual = {**ToMeConfig().to_dict(), "ratio": None}
        return ", ".join(
            f"{name}={getattr(value, '__name__', repr(value))}"
            for name, value in self.to_dict().items()
            if value != usual[name]
        )
