# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What to generate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ToMeError
from ..validate import check_integer, check_keys, check_number, fail

# Fields that hold what a model may take besides text: one for all images, or one per image.
INPUTS = ("images", "masks", "controls", "references")


@dataclass(frozen=True)
class Request:
    """What to generate: one image (or clip) per prompt.

    Where None is the default it stands for that of the model's class. Inputs are paths or PIL
    images: one serves all prompts, otherwise there is one for each, or it is an error.
    """

    prompts: Sequence[str]
    negative_prompt: str | Sequence[str] | None = None  #: one for all images, or one for each
    steps: int | None = None  #: denoising steps
    guidance: float | None = None  #: weight of classifier-free guidance; 1 or less is none
    size: tuple[int, int] | None = None  #: height and width in pixels
    frames: int | None = None  #: of a clip, for video models
    seed: int | Sequence[int] = 0  #: below 2**32; image i has ``seed + i``, or the list's i-th
    batch_size: int = 1  #: images per call of the model
    images: Sequence[Any] = ()  #: to start from or to inpaint
    masks: Sequence[Any] = ()  #: where to inpaint (white)
    controls: Sequence[Any] = ()  #: of a ControlNet
    references: Sequence[Any] = ()  #: the subject (ViCo, FastComposer)
    #: further keyword arguments of the model's call, such as ``dict(strength=0.5)``
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("seed", "negative_prompt", *INPUTS):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or len(value) in (0, len(self)):
                continue
            if key not in INPUTS or len(value) > 1:
                raise ToMeError(
                    f"{key} has {len(value)} entries for {len(self)} prompts; state one for all, "
                    "or one for each"
                )

    def __len__(self) -> int:
        """How many images are asked for."""
        return len(self.prompts)

    def seed_of(self, number: int) -> int:
        """The seed of an image: after the largest of 32 bits comes 0."""
        if isinstance(self.seed, int):
            return (self.seed + number) % 2**32
        return self.seed[number]

    def negatives(self, numbers: Sequence[int]) -> list[str] | None:
        """The negative prompts of some images, or None if they have none."""
        if self.negative_prompt is None or isinstance(self.negative_prompt, str):
            return self.negative_prompt and [self.negative_prompt] * len(numbers)
        return [self.negative_prompt[number] for number in numbers]

    def inputs(self, kind: str, numbers: Sequence[int]) -> list[Any]:
        """Those of :data:`INPUTS` that belong to some images; empty where none are given."""
        given = getattr(self, kind)
        return [given[number if len(given) > 1 else 0] for number in numbers] if given else []

    def part(self, numbers: Sequence[int]) -> Request:
        """The request for some of its images alone."""
        return replace(
            self,
            prompts=[self.prompts[number] for number in numbers],
            negative_prompt=self.negatives(numbers),
            seed=[self.seed_of(number) for number in numbers],
            **{kind: self.inputs(kind, numbers) for kind in INPUTS},
        )

    def batches(self) -> list[range]:
        """The numbers of the images of each batch."""
        count, step = len(self), self.batch_size
        return [range(first, min(first + step, count)) for first in range(0, count, step)]


def make_request(source: Any, **given: Any) -> Request:
    """What to generate: what is given, else what the config says, else the defaults.

    Args:
        source: A :class:`~.runners.Source`; its ``defaults`` are the config's ``infer_cfg``. None
            has no defaults.
        **given: Fields of :class:`Request`; None and empty lists are as if not given. ``extra`` is
            merged with the config's, key by key.

    Raises:
        ToMeError: An unknown field, a value out of range, no prompt, or lists that do not have one
            entry for each prompt.
    """
    known = [field.name for field in fields(Request)]
    values: dict[str, Any] = {}
    defaults = {} if source is None else source.defaults
    for what, entries in (("infer_cfg of the config", defaults), ("a request", given)):
        check_keys(what, entries, known)
        where = "" if entries is given else f"{what}: "
        for key, value in entries.items():
            if value is None or (isinstance(value, (list, tuple)) and not value):
                continue
            value = _checked(where, key, value)
            values[key] = {**values.get(key, {}), **value} if key == "extra" else value
    if "prompts" not in values:
        raise ToMeError("no prompt: state at least one, or infer_cfg=dict(prompts=...) in a config")
    return Request(**values)


def _checked(where: str, key: str, value: Any) -> Any:
    """The value of a field as :class:`Request` has it."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    if key in ("steps", "frames", "batch_size"):
        return check_integer(where, key, value, 1)
    if key == "guidance":
        return float(check_number(where, key, value, 0, math.inf))
    if key == "size":
        return parse_size(where, value)
    if key == "extra":
        if not isinstance(value, Mapping):
            fail(where, key, value, "a dict of arguments of the model's call", dict(strength=0.5))
        return dict(value)
    for one in listed:
        if key == "seed":
            # torch takes more, but its generator on the CPU looks at 32 bits only, as numpy's does.
            check_integer(where, key, one, 0, 2**32 - 1)
        elif key in INPUTS and not isinstance(one, (str, Path, Image.Image)):
            fail(where, key, one, "files or PIL images", ["image.png"])
        elif key == "prompts" and not (isinstance(one, str) and one.strip()):
            fail(where, key, one, "a text for each image", ["a red apple"])
        elif key == "negative_prompt" and not isinstance(one, str):
            fail(where, key, value, "a text, or one for each prompt", "blurry")
    if key == "prompts":
        return tuple(prompt.strip() for prompt in listed)
    return tuple(listed) if key in INPUTS or isinstance(value, (list, tuple)) else value


def parse_size(where: str, value: Any) -> tuple[int, int]:
    """``(height, width)`` in pixels from 256, (256, 384), or as texts ``'256'``, ``'256x384'``."""
    sides = value.lower().split("x") if isinstance(value, str) else value
    sides = sides if isinstance(sides, (list, tuple)) else [sides]
    sides = [int(side) if str(side).isdecimal() else 0 for side in sides]
    if len(sides) not in (1, 2) or 0 in sides:
        fail(where, "size", value, "height and width in pixels", (512, 512))
    return sides[0], sides[-1]
