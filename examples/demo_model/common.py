"""What the demo-model tools share: clear errors, atomic files, the npm package, feature network."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # the package beside these tools
DEFAULT_WORK_DIR = "work_dirs/demo_model"
ASSETS = REPO / "mmagic_tome" / "assets" / "demo_model"
DIT_ASSETS = ASSETS.with_name("demo_dit")


class ToolError(RuntimeError):
    """Something the user can put right: shown as one line, exit code 2."""


def run_tool(main) -> None:
    try:
        main()
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from the last checkpoint")
        sys.exit(130)


_torchvision_ops = None


def repair_torchvision() -> None:
    """Let diffusers and transformers be imported where torchvision's compiled ops do not load."""
    global _torchvision_ops
    if _torchvision_ops is not None:
        return
    with contextlib.suppress(ImportError):
        import mmagic_tome  # noqa: F401
    try:
        torch.ops.torchvision.nms  # noqa: B018
    except (AttributeError, RuntimeError):
        _torchvision_ops = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _torchvision_ops.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def write_atomically(path: Path, save) -> None:
    """`save(temporary_path)`, then one rename: an interruption leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save(temporary)
    os.replace(temporary, path)


def save_json(path: Path, value) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def build_features() -> torch.nn.Module:
    """EfficientNet-lite0 (ImageNet): maps for the VAE's loss, 1280 numbers for retrieval."""
    from features import EfficientNetLite0

    try:
        return EfficientNetLite0()
    except ImportError as error:
        raise ToolError(f"EfficientNet-lite0 needs {error.name}, which is not installed") from None


@torch.no_grad()
def embed(features: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] of any size -> (B, 1280) unit vectors."""
    return torch.nn.functional.normalize(features.pooled(images), dim=1)
