# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CLIP score and CMMD (transformers' CLIP)."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ToMeError
from .base import SetMetric, library
from .distances import gaussian_mmd


class CLIP:
    """A CLIP of transformers with its picture processor and tokenizer.

    Args:
        model: a local folder in transformers' layout (``config.json``, ``model.safetensors``,
            ``preprocessor_config.json`` and, for text, the tokenizer's files), or a name on
            the Hugging Face hub.
        device: where it runs.
        text: whether prompts are needed too.
        needed_by: who asks, for messages.

    Raises:
        ToMeError: transformers, or a file of the model, is not there.
    """

    def __init__(self, model: str, device: torch.device, text: bool, needed_by: str) -> None:
        transformers = library("transformers", "transformers", needed_by)
        looks_local = str(model).startswith(("/", "./", "../", "~"))
        source = str(Path(model).expanduser()) if looks_local else str(model)
        if looks_local and not Path(source).is_dir():
            raise ToMeError(f"{needed_by}: there is no folder {model}")
        try:
            self.model = transformers.CLIPModel.from_pretrained(source).float().eval().to(device)
            self.pictures = transformers.CLIPImageProcessor.from_pretrained(source)
            self.words = transformers.CLIPTokenizer.from_pretrained(source) if text else None
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(". ")
            raise ToMeError(
                f"{needed_by} cannot load CLIP {model!r}: {reason}. A local folder with "
                "config.json, model.safetensors, preprocessor_config.json and the tokenizer's "
                "files works in place of a hub name; name it by the option model"
            ) from error
        self.model.requires_grad_(False)
        self.device = device

    def image(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) uint8 -> (D,) of length 1."""
        picture = image[0].permute(1, 2, 0).cpu().numpy()
        pixels = self.pictures(images=picture, return_tensors="pt")["pixel_values"]
        hidden = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(hidden), dim=-1)[0]

    def text(self, prompt: str) -> Tensor:
        """A prompt -> (D,) of length 1; what is beyond the tokenizer's length is cut off."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.words([prompt], truncation=True, max_length=length, return_tensors="pt")
        hidden = self.model.text_model(**tokens.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(hidden), dim=-1)[0]


_load = lru_cache(maxsize=2)(CLIP)


class CLIPScore(SetMetric):
    """100 x the cosine of picture and prompt in CLIP's space, at least 0; mean over pictures.

    The formula of torchmetrics. Values depend on the CLIP: its name is in the label.

    Args:
        model: a local folder or a name on the Hugging Face hub. Default: OpenAI's ViT-L/14.
        device, min_samples: see :class:`SetMetric`.

    Raises:
        ToMeError: transformers or the model is not there.

    Source: Hessel et al., "CLIPScore", 2021, without its factor 2.5.
    """

    name = "clip_score"
    higher_is_better = True
    needs_real = False
    needs_prompts = True
    min_samples = 1
    label = "CLIP score"

    def __init__(
        self,
        model: str | os.PathLike = "openai/clip-vit-large-patch14",
        device: str | torch.device = "cpu",
        min_samples: int | None = None,
    ) -> None:
        super().__init__(device, min_samples)
        self.clip = _load(str(model), self.device, True, self.label)
        self.label = f"CLIP score ({Path(model).name})"

    def one(self, image: Tensor, prompt: str) -> Tensor:
        cosine = self.clip.image(image) @ self.clip.text(prompt)
        return (100 * cosine.clamp_min(0)).reshape(1)

    def value(self, features: Tensor, reference: Tensor | None) -> dict[str, float]:
        return {"clip_score": float(features.mean())}


class CMMD(SetMetric):
    """1000 x the squared maximum mean discrepancy of CLIP's picture vectors; 0 is best.

    Gaussian kernel of width 10 on vectors of length 1. It is stable at far fewer pictures than
    FID. Values are comparable with the paper's only for its CLIP, the default here; others are
    named in the label.

    Args:
        model: a local folder or a name on the Hugging Face hub. Default: OpenAI's ViT-L/14 of
            336 pixels.
        device, min_samples: see :class:`SetMetric`.

    Raises:
        ToMeError: transformers or the model is not there.

    Source: Jayasumana et al., "Rethinking FID: towards a better evaluation metric for image
    generation", 2024.
    """

    name = "cmmd"
    higher_is_better = False
    min_samples = 100
    label = "CMMD"

    def __init__(
        self,
        model: str | os.PathLike = "openai/clip-vit-large-patch14-336",
        device: str | torch.device = "cpu",
        min_samples: int | None = None,
    ) -> None:
        super().__init__(device, min_samples)
        self.clip = _load(str(model), self.device, False, self.label)
        self.label = f"CMMD ({Path(model).name})"

    def one(self, image: Tensor, prompt: str | None) -> Tensor:
        return self.clip.image(image)

    def value(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        return {"cmmd": 1000 * gaussian_mmd(features, reference, sigma=10.0)}
