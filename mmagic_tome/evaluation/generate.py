# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Makes the pictures of an evaluation: every contender, every prompt, each exactly once.

Pictures are made in fixed batches: batch b holds the pictures b * size to (b + 1) * size - 1,
whoever makes it and whenever. A batch that was only half committed when the process was
killed is run again as a whole, and its missing pictures are committed. So interrupted,
sharded and uninterrupted runs give the same pixels, also where the lowest bits of a sum
depend on the size of the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..apis.text2image import Generator, Request
from ..errors import ToMeError
from ..schedulers import scheduler_name
from .contenders import Contender
from .prompts import Prompt
from .store import RunFolder
from .team import Team

# Libraries that decide what a picture looks like.
LIBRARIES = ("torch", "diffusers", "transformers", "mmagic")


@dataclass
class PictureRequest(Request):
    """A request whose pictures have seeds and negative prompts of their own.

    Args:
        pictures: One :class:`Prompt` per picture, each with its seed; the ``prompts`` of the
            request are their texts.
    """

    pictures: Sequence[Prompt] = field(default_factory=list)

    def seed_of(self, number: int) -> int:
        """Return the seed of a picture."""
        return self.pictures[number].seed

    def negatives(self, numbers) -> list[str] | None:
        """Return the negative prompts of some pictures, or None if none of all has one."""
        if all(picture.negative is None for picture in self.pictures):
            return None
        return [self.pictures[number].negative or "" for number in numbers]


class LatentWatch:
    """Sees what a model decodes while it is entered.

    A NaN becomes a black pixel in a picture and can no longer be told from a black one.

    Args:
        model: A MMagic model; its ``decode_latents`` is looked at, if it has one.

    Attributes:
        latents: Final latents (B, C, h, w) in float32 on the CPU, or None.
        finite: One bool per picture: latents and decoded pixels are finite numbers.
    """

    def __init__(self, model) -> None:
        self.model = model
        self.latents: torch.Tensor | None = None
        self.finite: list[bool] = []
        self._hidden: Any = None

    def __enter__(self) -> LatentWatch:
        decode = getattr(self.model, "decode_latents", None)
        if decode is not None:

            def watched(latents, *args, **kwargs):
                decoded = decode(latents, *args, **kwargs)
                self.latents = latents.detach().float().cpu()
                pixels = torch.as_tensor(decoded).detach()
                self.finite = [
                    bool(torch.isfinite(latent).all() and torch.isfinite(image).all())
                    for latent, image in zip(self.latents, pixels)
                ]
                return decoded

            # On the instance, where it hides the method of the class (or what hid that before).
            self._hidden = self.model.__dict__.get("decode_latents")
            self.model.__dict__["decode_latents"] = watched
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.model.__dict__.pop("decode_latents", None)
        if self._hidden is not None:
            self.model.__dict__["decode_latents"] = self._hidden


def fingerprint(generator: Generator, device: torch.device) -> dict[str, Any]:
    """Return what all pictures of an evaluation depend on, as a JSON-able dict.

    The weights are those that were loaded, not the file's name: a checkpoint that is replaced
    in place is noticed, one that is moved is not.
    """
    model, request = generator.model, generator.request
    scheduler = model.test_scheduler
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {
        "prompts": hashlib.sha256(
            json.dumps([[p.text, p.negative, p.seed] for p in request.pictures]).encode()
        ).hexdigest(),
        "pictures": len(request.pictures),
        "steps": request.steps,
        "guidance": request.guidance,
        "size": list(generator.size),
        "batch_size": request.batch_size,
        "dtype": str(next(model.unet.parameters()).dtype).replace("torch.", ""),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "model": type(model).__name__,
        "scheduler": scheduler_name(scheduler),
        "scheduler_config": scheduler_settings(scheduler),
        "networks": network_settings(model),
        "weights": weights_digest(model),
        "versions": found,
    }


def scheduler_settings(scheduler) -> dict[str, Any]:
    """Return the settings of a sampler, JSON-able.

    Samplers of diffusers have a ``config``. Those of MMagic do not: their attributes serve,
    arrays as hashes, without what a run leaves behind.
    """
    settings = getattr(scheduler, "config", None)
    if settings is None:
        settings = {}
        for key, value in vars(scheduler).items():
            if key in ("timesteps", "num_inference_steps"):
                continue
            if isinstance(value, (torch.Tensor, np.ndarray)):
                value = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()[:16]
            if isinstance(value, (bool, int, float, str, list, tuple, type(None))):
                settings[key] = value
    # diffusers notes there which settings a file did not name, in the order of a set, which is
    # another one in every process; and what they are is in the settings.
    settings = {key: value for key, value in settings.items() if key != "_use_default_values"}
    # DPM-Solver's has an infinity, for which JSON has no word.
    text = json.dumps(settings, default=str, sort_keys=True)
    return json.loads(text, parse_constant=str)


def network_settings(model) -> dict[str, Any]:
    """Return the settings of a model's networks, JSON-able.

    Some change pictures but no weights: the number of heads, the scale of the latents.
    """
    return {
        name: {
            # Where it came from says nothing of what it is.
            key: value
            for key, value in json.loads(json.dumps(dict(part.config), default=str)).items()
            if not key.startswith("_")
        }
        for name, part in model.named_children()
        if isinstance(getattr(part, "config", None), Mapping)
    }


def weights_digest(model) -> str:
    """Return a hash of all parameters and buffers of a model, with their names."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def too_long(generator: Generator) -> list[int]:
    """Return the pictures whose prompt is longer than what the model reads of it.

    Raises:
        ToMeError: There are some, and pictures are made in batches: MMagic cannot put texts
            of different lengths into one batch if one of them has to be cut.
    """
    pictures = generator.request.pictures
    found = set()
    for name in ("tokenizer", "tokenizer_one", "tokenizer_two"):
        tokenizer = getattr(generator.model, name, None)
        most = getattr(tokenizer, "model_max_length", None)
        if most is None:
            continue
        for number, picture in enumerate(pictures):
            texts = [picture.text, picture.negative or ""]
            if any(len(tokenizer(text).input_ids) > most for text in texts):
                found.add(number)
    if found and generator.request.batch_size > 1:
        first = min(found)
        raise ToMeError(
            f"{len(found)} prompts are longer than the model reads, such as number {first + 1}, "
            f"{pictures[first].text[:60]!r}, and MMagic cannot cut a text in a batch; shorten "
            "them, or use --batch-size 1"
        )
    return sorted(found)


def make_pictures(
    generator: Generator, contenders: Sequence[Contender], folder: RunFolder, team: Team
) -> int:
    """Make all pictures that the folder does not have yet.

    Args:
        generator: With a :class:`PictureRequest`.
        contenders: In the order in which to make them.
        folder: Where they are committed, one by one.
        team: Whose rank takes every n-th batch.

    Returns:
        How many this process made.

    Raises:
        ToMeError: The disk is full; what was committed stays.
    """
    request = generator.request
    batches = request.batches()
    # Batches of all contenders in one row, so that ranks stay busy to the end.
    work = [(contender, numbers) for contender in contenders for numbers in batches]
    missing = [
        place
        for place, (contender, numbers) in enumerate(work)
        if any(not folder.has_picture(contender.folder, number) for number in numbers)
    ]
    # As rank 0 sees it: others may look when the first pictures are there already.
    mine = [work[place] for place in team.share(team.first(missing))]
    # Steps, not pictures: a contender with half the steps takes half the time.
    steps = sum((c.steps or request.steps) * len(numbers) for c, numbers in mine)
    made = 0
    with tqdm(
        total=steps,
        desc="generating",
        unit="step",
        dynamic_ncols=True,
        disable=team.rank != 0,
        mininterval=team.bar_interval,
    ) as bar:
        for contender, numbers in mine:
            bar.set_postfix_str(contender.name)
            count = len(numbers)
            with (
                contender.on(generator.model) as handles,
                LatentWatch(generator.model) as watch,
            ):
                images, _ = generator.run(
                    numbers, contender.steps, on_step=lambda count=count: bar.update(count)
                )
                targets = [] if handles.tome is None else handles.tome.stats()
            for place, number in enumerate(numbers):
                if folder.has_picture(contender.folder, number):
                    continue
                _commit(folder, contender, request, watch, number, place, images[place], targets)
                made += 1
    return made


def _commit(folder, contender, request, watch, number, place, image, targets) -> None:
    picture = request.pictures[number]
    record = {
        "number": number,
        "prompt": picture.text,
        "negative_prompt": picture.negative,
        "seed": picture.seed,
        # A model whose decoding cannot be watched is taken at its word.
        "finite": watch.finite[place] if watch.finite else True,
        "tokens": sum(row["tokens"] or 0 for row in targets),
        "kept": sum(row["kept"] or 0 for row in targets),
    }
    text = {
        "prompt": picture.text,
        "seed": str(picture.seed),
        "contender": json.dumps(contender.spec()),
    }
    latents = None if watch.latents is None else np.asarray(watch.latents[place])
    folder.save_picture(contender.folder, number, image, latents, record, text)
