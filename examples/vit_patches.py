# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which patches of images a vision transformer merges, block by block: a PNG per image.

The config's ``model`` is a vision transformer, with or without ``type='ToMe'`` around it, and
``vit_input`` describes what it takes::

    vit_input = dict(kind="image", size=224, patch=14, mean=(...), std=(...))

Usage: ``python examples/vit_patches.py CONFIG IMAGE ... [--r N] [--out FOLDER]``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs import examples

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab.maps import enlarged, merge_map
from mmagic_tome.lab.plots import contact_sheet
from mmagic_tome.patch import find_patch
from mmagic_tome.vit import ViTConfig, ViTHandle, apply_tome_vit, find_vit, get_vit_handle
from mmagic_tome.vit.patch import ViTPatch

COLUMNS = 4  # blocks on a sheet, evenly spread


def draw(
    config: Any, images: Sequence[str | Path], out: str | Path, r: int | None = None
) -> list[Path]:
    """Draw a sheet of four blocks per image.

    Args:
        config: mmengine's ``Config``.
        images: Files, of which the middle square is taken.
        out: Folder of the sheets.
        r: Tokens to remove per block. Default: None, the config's.

    Returns:
        The sheets.

    Raises:
        ToMeError: Nothing was merged.
    """
    expects, drawn = config["vit_input"], []
    model, handle = _build(config, r)
    grid = (expects["size"] // expects["patch"],) * 2
    Path(out).mkdir(parents=True, exist_ok=True)
    for path in map(Path, images):
        image = Image.open(path).convert("RGB")
        square = ImageOps.fit(image, (expects["size"],) * 2, Image.Resampling.BICUBIC)
        sources = _sources(model, _tensor(square, expects))
        if sources[-1] is None:
            raise ToMeError("nothing was merged, so there is nothing to draw; pass a larger --r")
        plain = enlarged(square, grid)
        maps = [plain if one is None else merge_map(one, grid, plain) for one in sources]
        heads = [f"block {block}: {kept}" for block, (_, kept) in enumerate(handle.tokens, 1)]
        places = np.linspace(0, len(maps) - 1, min(COLUMNS, len(maps)))
        shown = sorted(set(places.round().astype(int).tolist()))
        row = [plain, *(maps[block] for block in shown)]
        heads = ["image", *(heads[block] for block in shown)]
        sheet = contact_sheet(path.stem, heads, [("tokens left after each block", row)])
        drawn.append(Path(out) / f"{path.stem}_tokens.png")
        sheet.save(drawn[-1])
    return drawn


def _build(config: Any, r: int | None) -> tuple[nn.Module, ViTHandle]:
    """The model with what its config applies, or ``r``, recording where tokens go."""
    from mmengine.registry import MODELS

    model = MODELS.build(config["model"]).eval()
    handle = get_vit_handle(model)
    options = ViTConfig() if handle is None else handle.config
    if r is not None:
        options = options.replace(r=r)
    return model, apply_tome_vit(model, options, trace_source=True)


@torch.inference_mode()
def _sources(model: nn.Module, x: torch.Tensor) -> list[np.ndarray | None]:
    """Per block, (patches,) the token that holds each; None before anything was merged."""
    vit, found = find_vit(model), []
    patch = find_patch(vit.network, ViTPatch)

    def note(*_: Any) -> None:
        source = patch.context.source
        found.append(None if source is None else source[0, vit.prefix :].cpu().numpy().copy())

    hooks = [block.module.register_forward_hook(note) for block in vit.blocks]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tensor(image: Image.Image, expects: dict[str, Any]) -> torch.Tensor:
    """(1, 3, H, W), normalized."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(expects[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((x - mean) / std)[None]


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="such as configs/vit/vit-s14-focus_tome-r13.py")
    parser.add_argument("images", nargs="+", help="files")
    parser.add_argument("--r", type=int, help="tokens to remove per block; default: the config's")
    parser.add_argument("--out", default="work_dirs/vit_patches", help="folder of the sheets")
    args = parser.parse_args()
    from mmengine.config import Config

    for path in draw(Config.fromfile(args.config), args.images, args.out, args.r):
        print(path)


if __name__ == "__main__":
    main()
