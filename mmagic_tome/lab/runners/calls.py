# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a call of a diffusers pipeline takes: read from its signature and its config files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import ToMeError
from ...models.find import DENOISERS
from ...validate import check_keys
from ..request import Request
from .base import check_inputs, check_size
from .media import load_image

#: Components that turn latents into images; the first that a pipeline has.
DECODERS = ("vae", "movq", "vqgan")
# Names of the guidance weight. Some pipelines have several; the one with a number as default acts.
_GUIDANCE = ("guidance_scale", "true_cfg_scale", "max_guidance_scale")
# Arguments that fields of a request set, or a runner.
_FIELDS = (
    *("prompt", "negative_prompt", "num_inference_steps", "height", "width", "num_frames"),
    *("generator", "output_type", "return_dict", "latents", "num_images_per_prompt"),
    *("num_videos_per_prompt", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
# Only pipelines that make clips have one of these.
_CLIPS = ("num_frames", "frames", "video", "control_video")
# Pipelines that start from an image although their signature does not insist on it.
_FROM_IMAGE = re.compile("ImageToVideo|I2V|2Img|Inpaint|Upscale|Pix2Pix|Edit")


class PipelineCall:
    """What a class of pipelines takes.

    Args:
        kind: The class.
        configs: Name of a component -> its config; those of the denoising networks and of the VAE
            are used, as far as they are there.

    Attributes:
        steps, guidance: By default; None and 0 if the class has no default.
        video: Whether the class makes clips.
        arguments_of: Each of :data:`INPUTS` that the class takes -> name of the argument.
        needed: Those of them that it needs.
        unit: What height and width in pixels must be multiples of; 1 if unknown.
    """

    def __init__(self, kind: type, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.name, self.configs = kind.__name__, configs
        # Further **kwargs are ignored by pipelines, or what they took in the past.
        self.parameters = {
            name: parameter
            for name, parameter in inspect.signature(kind.__call__).parameters.items()
            if name != "self"
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        self.steps = self.default("num_inference_steps")
        names = [name for name in _GUIDANCE if name in self.parameters]
        numbers = [name for name in names if self.default(name) is not None]
        self.guidance_name = next(iter(numbers or names), None)
        self.guidance = float(self.default(self.guidance_name) or 0)
        self.video = any(name in self.parameters for name in _CLIPS)
        self.arguments_of = self._inputs(kind)
        self.needed = {*self.arguments_of}
        if not self._starts_from_image():
            self.needed.discard("images")
        vaes = (configs[name] for name in DECODERS if name in configs)
        self._factor = next(map(_vae_factor, vaes), 1)
        self.unit = self._factor * self._patch(kind)

    def default(self, name: str | None) -> Any:
        """Default of an argument; None if it has none, or is not there."""
        parameter = self.parameters.get(name)
        if parameter is None or parameter.default is parameter.empty:
            return None
        return parameter.default

    def _inputs(self, kind: type) -> dict[str, str]:
        components = inspect.signature(kind.__init__).parameters
        controlled = "controlnet" in components or "adapter" in components
        # Without an argument of its own the control image is `image`.
        own = "control_image" in self.parameters
        names = dict(
            images="image" if own or not controlled else "",
            masks="mask_image",
            controls="image" if controlled and not own else "control_image",
            references="example_image",
        )
        return {field: name for field, name in names.items() if name in self.parameters}

    def _starts_from_image(self) -> bool:
        image = self.parameters.get(self.arguments_of.get("images"))
        required = image is not None and image.default is image.empty
        return required or "masks" in self.arguments_of or bool(_FROM_IMAGE.search(self.name))

    def _patch(self, kind: type) -> int:
        """Latents of a side that make one token."""
        patch = 1
        for name in DENOISERS:
            config = self.configs.get(name, {})
            size = config.get("patch_size") or config.get("all_patch_size") or 1
            patch = max(patch, size if isinstance(size, int) else size[-1])
        # Flux and others make one token of 2x2 latents before the network is called.
        pack = getattr(kind, "_pack_latents", None)
        if pack is not None and "patch_size" not in inspect.signature(pack).parameters:
            patch = max(patch, 2)
        return patch

    def check(self, request: Request) -> None:
        """Raise ToMeError for the first thing of a request that the class cannot serve."""
        check_inputs(self.name, request, self.arguments_of, self.needed)
        if "num_inference_steps" not in self.parameters:
            raise ToMeError(f"{self.name} has no denoising steps to measure")
        if request.steps is None and self.steps is None:
            raise ToMeError(f"{self.name} has no default number of steps; state steps")
        sized = "height" in self.parameters or "images" in self.arguments_of
        for field, taken in {
            "negative_prompt": "negative_prompt" in self.parameters,
            "frames": "num_frames" in self.parameters,
            "guidance": self.guidance_name is not None,
            "size": sized,
        }.items():
            if getattr(request, field) is not None and not taken:
                raise ToMeError(f"{self.name} takes no {field}; leave it out")
        check_size(self.name, request.size, self.unit)
        known = [name for name in self.parameters if name not in (*_FIELDS, self.guidance_name)]
        check_keys(f"the call of {self.name}", request.extra, known)
        given = {self.arguments_of[field] for field in self.arguments_of if getattr(request, field)}
        given |= {*_FIELDS, *request.extra}
        missing = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty and name not in given
        ]
        if missing:
            raise ToMeError(
                f"{self.name} needs {', '.join(missing)}, which must be among the extra parameters"
            )

    def arguments(
        self, request: Request, numbers: Sequence[int], steps: int, size: tuple[int, int]
    ) -> dict[str, Any]:
        """Keyword arguments of a call for some images of a request that :meth:`check` has seen.

        ``size`` is height and width in pixels; images are resized to it where the class takes none,
        or they differ in size: some classes would join their pixels, others stretch all.
        """
        seeds = [request.seed_of(number) for number in numbers]
        found = {
            "prompt": [request.prompts[number] for number in numbers],
            "negative_prompt": request.negatives(numbers),
            "num_inference_steps": steps,
            self.guidance_name: request.guidance,
            "height": size[0],
            "width": size[1],
            "num_frames": request.frames,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "pil",
        }
        loaded = {
            field: [load_image(image) for image in request.inputs(field, numbers)]
            for field in self.arguments_of
        }
        sizes = {one.size for field in loaded if field != "references" for one in loaded[field]}
        resized = "height" not in self.parameters or len(sizes) > 1
        for field, images in loaded.items():
            if resized:
                images = [image.resize((size[1], size[0])) for image in images]
            # Some pipelines take one image, but no list of one.
            one = images[0] if len(images) == 1 else images or None
            found[self.arguments_of[field]] = one
        known = {key: value for key, value in found.items() if key in self.parameters}
        return {key: value for key, value in known.items() if value is not None} | request.extra

    def size(self, pipeline: Any, request: Request) -> tuple[int, int]:
        """Height and width in pixels: the request's; else that of the first image or control image,
        rounded down to :attr:`unit`; else the pipeline's own."""
        if request.size is not None:
            return request.size
        for field in ("images", "controls"):
            if getattr(request, field) and self.default("height") is None:
                width, height = load_image(getattr(request, field)[0]).size
                return tuple(max(1, side // self.unit) * self.unit for side in (height, width))
        if self.default("height") and self.default("width"):
            return self.default("height"), self.default("width")
        config = next((self.configs[name] for name in DENOISERS if name in self.configs), {})
        sides = config.get("sample_height"), config.get("sample_width")
        if None in sides:
            side = getattr(pipeline, "default_sample_size", None) or config.get("sample_size")
            sides = (side, side) if isinstance(side, int) else side
        if not sides:
            return 1024, 1024  # what Z-Image has in its code
        return sides[0] * self._factor, sides[1] * self._factor


def _vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels of a side per latent, by a VAE's config; 1 if unknown."""
    for name in ("scale_factor_spatial", "spatial_compression_ratio"):
        if isinstance(config.get(name), int):
            return config[name]
    if "spatio_temporal_scaling" in config:  # LTX
        return config.get("patch_size", 1) * 2 ** sum(map(bool, config["spatio_temporal_scaling"]))
    levels = config.get("block_out_channels") or config.get("dim_mult") or [0]
    return 2 ** (len(levels) - 1)
