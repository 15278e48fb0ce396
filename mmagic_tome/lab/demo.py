# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the demo page does behind its controls: baseline and accelerated runs of one model."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import ToMeConfig
from ..errors import ToMeError
from ..settings import Setting
from ..timeline import scheduler_of
from .measure import WARM_UP_STEPS
from .methods import BASELINE, Method
from .metrics import paired
from .request import Request, make_request
from .runners import Output, Source, open_source, runner_of
from .runners.media import to_tensor

#: Name on the page -> class in diffusers. Only those that fit the model's own scheduler are shown.
SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "DPM-Solver++ 2M": "DPMSolverMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "PNDM": "PNDMScheduler",
    "Heun": "HeunDiscreteScheduler",
    "Euler ancestral (adds noise)": "EulerAncestralDiscreteScheduler",
    "Flow-match Euler": "FlowMatchEulerDiscreteScheduler",
    "Flow-match Heun": "FlowMatchHeunDiscreteScheduler",
}
#: Fields of a request that the demo model starts with, as in its figures.
DEMO_MODEL = {"steps": 20, "guidance": 3.0}
_DEMO_PROMPTS = ("red apple", "smiling face with sunglasses", "sailboat", "green apple")
# Baselines that are kept: their images, and latents of a few hundred KiB at most.
_MOST_BASELINES = 16


@dataclass(frozen=True)
class Choice:
    """What a visitor of the page has chosen."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    scheduler: str = ""  #: a name of :attr:`Demo.schedulers`; '' is the model's own
    size: str = ""  #: as ``--size`` takes it; '' is the model's own
    tolerance: float = 0.02  #: of step caching; 0 skips nothing
    ratio: float = 0.0  #: of token merging; 0 merges nothing
    prop_attn: bool = True  #: proportional attention wherever attention takes weights

    @property
    def baseline(self) -> Choice:
        """The same without acceleration: what the baseline's image depends on."""
        return replace(self, tolerance=0.0, ratio=0.0, prop_attn=True)


@dataclass
class Comparison:
    """A baseline run and an accelerated one of the same request."""

    baseline: Output
    accelerated: Output
    psnr: float | None  #: in dB; None if the images are identical
    latent_error: float | None  #: measured; None if latents are not known
    predicted_error: float | None  #: None without a tolerance
    steps: list[str]  #: of each step 'computed' or the region that was skipped
    summary: str  #: of the handles
    code: str  #: what to write to get the same
    notes: list[str]  #: warnings of this package, such as that nothing was skipped

    @property
    def speedup(self) -> float:
        """How many times as fast the accelerated run was; of one run each."""
        return self.baseline.seconds / self.accelerated.seconds


def demo_source(**given: Any) -> Source:
    """What :func:`~.runners.open_source` returns for these arguments; without any the demo model as
    a diffusers pipeline, which needs no MMagic."""
    if any(given.values()):
        return open_source(**given)
    from ..assets import asset_path

    source = open_source(pipeline=asset_path("demo_model"))
    source.defaults.update(DEMO_MODEL, prompts=_DEMO_PROMPTS)
    return source


class Demo:
    """A loaded model and its latest baselines.

    Args:
        source: What is run.
        device, dtype: As of :meth:`Source.load <mmagic_tome.lab.runners.Source.load>`.
        **given: Fields of a :class:`~.request.Request` that the page starts with. Inputs besides
            text (``images``, ``controls`` ...) stay as they are.

    Attributes:
        prompts: Examples to choose from; the first is shown.
        schedulers: Names to choose from, the model's own first.
        first: The choice that the page begins with.

    Raises:
        ToMeError: The model cannot be loaded or serve the request.
    """

    def __init__(
        self,
        source: Source,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **given: Any,
    ) -> None:
        self.source = source
        if not given.get("prompts") and not source.defaults.get("prompts"):
            given["prompts"] = ["a red apple on a wooden table"]
        request = make_request(source, **given)
        self.prompts = list(dict.fromkeys(request.prompts))
        self._request = replace(request.part([0]), batch_size=1)
        self._baselines: OrderedDict[Choice, Output] = OrderedDict()
        runner = source.load(self._request, device, dtype)
        self.model = runner.model
        self._scheduler = scheduler_of(self.model)
        self.schedulers = self._find_schedulers(runner.scheduler)
        self.first = Choice(
            prompt=self.prompts[0],
            negative_prompt=(self._request.negatives([0]) or [""])[0],
            seed=self._request.seed_of(0),
            steps=runner.steps,
            guidance=runner.guidance,
            scheduler=self.schedulers[0],
            size="{}x{}".format(*self._request.size) if self._request.size else "",
            **_start_of(source.setting),
        )
        # Of either run the first is slower than all others.
        runner.run([0], min(WARM_UP_STEPS, runner.steps))

    def _find_schedulers(self, own: str) -> list[str]:
        """Names of the schedulers that the model can be given, its own first."""
        fitting = {cls.__name__ for cls in getattr(self._scheduler, "compatibles", ())}
        names = {known: name for name, known in SCHEDULERS.items()}
        others = [name for known, name in names.items() if known in fitting and known != own]
        # MMagic wraps its schedulers; those of a pipeline are diffusers' own.
        return [names.get(own, own), *(others if hasattr(self.model, "scheduler") else [])]

    def compare(self, choice: Choice, on_step: Callable[[str], object] = str) -> Comparison:
        """Run what was chosen; the baseline only if it is not there already.

        Args:
            choice: What a visitor has chosen.
            on_step: Called after each step with the name of the run: 'baseline', 'accelerated'.

        Raises:
            ToMeError: A choice that the model cannot serve, or that accelerates nothing.
        """
        method = Method("accelerated", self._setting(choice))
        if method.kind == "baseline":
            raise ToMeError(
                "tolerance and ratio are 0, so there is nothing to compare; raise one of them"
            )
        request = self._checked(choice)
        self._use_scheduler(choice.scheduler)
        runner = runner_of(self.model, request, self.source)
        baseline = self._baselines.get(choice.baseline)
        if baseline is None:
            with BASELINE.on(self.model):
                baseline = runner.run([0], on_step=lambda: on_step("baseline"))
            self._baselines[choice.baseline] = baseline
            while len(self._baselines) > _MOST_BASELINES:
                self._baselines.popitem(last=False)
        with method.on(self.model) as handles:
            with _own_warnings() as notes:
                accelerated = runner.run([0], on_step=lambda: on_step("accelerated"))
            cache = handles.cache
            steps = (cache and cache.steps) or ["computed"] * runner.steps
            predicted = cache.predicted_error if cache else None
            return Comparison(
                baseline,
                accelerated,
                **_fidelity(baseline, accelerated),
                predicted_error=None if predicted is None else max(predicted, default=0.0),
                steps=steps,
                summary="\n\n".join(handle.summary() for handle in handles),
                code=_code(method.setting),
                notes=notes,
            )

    def _setting(self, choice: Choice) -> Setting:
        """The config's own options of token merging, with the chosen ratio and tolerance."""
        own = self.source.setting.tome
        setting = Setting(own) if own is not None and choice.ratio else Setting()
        if choice.ratio:
            prop_attn = "auto" if choice.prop_attn else False
            setting = setting.replace(ratio=choice.ratio, prop_attn=prop_attn)
        if choice.tolerance:
            setting = setting.replace(cache={"tolerance": choice.tolerance})
        return setting

    def _checked(self, choice: Choice) -> Request:
        given = {name: getattr(choice, name) for name in ("seed", "steps", "guidance")}
        given["negative_prompt"] = choice.negative_prompt.strip() or None
        given["size"] = choice.size.strip() or None
        given["prompts"] = [choice.prompt]
        request = make_request(None, **{**vars(self._request), **given})
        self.source.check(request)
        return request

    def _use_scheduler(self, name: str) -> None:
        if name not in ("", *self.schedulers):
            raise ToMeError(f"there is no scheduler {name!r}; write one of {self.schedulers}")
        if len(self.schedulers) == 1:
            return
        if name in ("", self.schedulers[0]):
            self.model.scheduler = self._scheduler
            return
        import diffusers

        cls = getattr(diffusers, SCHEDULERS[name])
        self.model.scheduler = cls.from_config(self._scheduler.config)


def _fidelity(base: Output, other: Output) -> dict[str, float | None]:
    """``psnr`` and ``latent_error`` of the first image, see :class:`Comparison`."""
    psnr, error = paired("psnr"), None
    images = (one.images[0] for one in (base, other))
    frames = (one if isinstance(one, (list, tuple)) else [one] for one in images)
    value = psnr.mean(psnr(*map(to_tensor, frames)))
    if base.latents is not None and other.latents is not None:
        error = float(paired("latent_error")(base.latents[:1], other.latents[:1]))
    return {"psnr": value if math.isfinite(value) else None, "latent_error": error}


@contextlib.contextmanager
def _own_warnings() -> Iterator[list[str]]:
    """Yields a list that has this package's warnings on exit; those of other libraries are lost."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield notes
    package = Path(__file__).resolve().parents[1]
    notes += [str(one.message) for one in caught if package in Path(one.filename).parents]


def _start_of(setting: Setting) -> dict[str, Any]:
    """What :class:`Choice` has of a config, as far as the page can show them."""
    found = {}
    if setting.cache is not None and setting.cache[0].tolerance is not None:
        found["tolerance"] = setting.cache[0].tolerance
    if setting.tome is not None:
        ratio = setting.tome.ratio
        found["ratio"] = ratio if isinstance(ratio, float) else 0.5
        found["prop_attn"] = setting.tome.prop_attn is not False
        if setting.cache is None:
            found["tolerance"] = 0.0
    return found


def _code(setting: Setting) -> str:
    """The calls that apply a setting."""
    lines = []
    if setting.cache is not None:
        lines.append(f"mmagic_tome.apply_cache(pipeline, tolerance={setting.cache[0].tolerance:g})")
    if setting.tome is not None:
        usual = ToMeConfig().to_dict()
        changed = {
            name: value
            for name, value in setting.tome.to_dict().items()
            if name == "ratio" or value != usual[name]
        }
        options = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        lines.append(f"mmagic_tome.apply_tome(pipeline, {options})")
    return "\n".join(lines)
