"""The training images as arrays and tensors; sample sheets and loss curves as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from common import ToolError, write_atomically


def autocast(device):
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    images = (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    rows = math.ceil(len(images) / columns)
    canvas = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    canvas[: len(images)] = images
    h, w = images.shape[1:3]
    return canvas.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)


def save_image(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    write_atomically(path, lambda p: Image.fromarray(array).save(p, format="PNG"))


class Data:
    def __init__(self, work_dir: Path):
        folder = work_dir / "data"
        if not (folder / "captions.json").is_file():
            raise ToolError(f"no data in {folder}: run prepare_data.py --work-dir {work_dir} first")
        entries = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self.captions = [e["caption"] for e in entries]
        self.concepts = [i for i, e in enumerate(entries) if e["concept"]]
        self.images = {
            s: np.load(folder / f"images_{s}.npy", mmap_mode="r") for s in (64, 128, 256)
        }


def plot_losses(work_dir: Path) -> None:
    """All stages that have a log, in one plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    for path in sorted((work_dir / "logs").glob("*.json"), key=lambda p: p.stat().st_mtime):
        log = json.loads(path.read_text(encoding="utf-8"))
        if log["losses"]:
            steps, _, losses = zip(*log["losses"])
            ax = axes[0 if path.stem.startswith(("vae", "decoder")) else 1]
            ax.plot(steps, losses, label=f"{path.stem} ({log['seconds'] / 60:.0f} min)")
    for ax in axes:
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        ax.set_yscale("log")
        ax.grid(alpha=0.3, which="both")
        if ax.lines:
            ax.legend()
    figure.tight_layout()
    write_atomically(work_dir / "loss_curve.png", lambda p: figure.savefig(p, dpi=90, format="png"))
    plt.close(figure)
