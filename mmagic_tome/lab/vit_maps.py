# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which patches of an image a vision transformer merges, block by block.

The config's ``model`` is a vision transformer, with or without ``type='ToMe'`` around it, and
``vit_input`` describes what it takes::

    vit_input = dict(kind="image", size=224, patch=14, mean=(...), std=(...))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import ToMeError
from ..patch import find_patch
from ..vit import ViTConfig, ViTHandle, apply_tome_vit, find_vit, get_vit_handle
from ..vit.patch import ViTPatch
from . import plots
from .infer import save_results
from .maps import enlarged, merge_map, spread
from .progress import progress_bar
from .runners import load_image, save_media

_KEYS = ("size", "patch", "mean", "std")
_COLUMNS = 4  # blocks on a sheet, evenly spread


def check(config: Any, images: Sequence[str]) -> list[Image.Image]:
    """Return the middle squares of images; fail if nothing can be drawn, before a model is built.

    Raises:
        ToMeError: The config is not of a vision transformer for images; an image cannot be read.
    """
    expects = config.get("vit_input")
    if not isinstance(expects, dict):
        raise ToMeError("--vit takes a config with model and vit_input, as those of configs/vit")
    if expects.get("kind") != "image":
        raise ToMeError(f"visualize draws images; vit_input has kind={expects.get('kind')!r}")
    missing = [key for key in _KEYS if key not in expects]
    if missing:
        raise ToMeError(f"vit_input of the config needs {missing[0]}")
    if not images:
        raise ToMeError("--vit needs images: --img FILE ...")
    size = (expects["size"],) * 2
    return [ImageOps.fit(load_image(image), size, Image.Resampling.BICUBIC) for image in images]


def visualize_vit(
    config: Any,
    images: Sequence[str],
    *,
    folder: str | Path,
    r: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Draw which patches are merged: per image a sheet of four blocks.

    Args:
        config: mmengine's ``Config``.
        images: Files.
        folder: Where files go, with ``results.json``.
        r: Tokens to remove per block. Default: None, the config's.
        device: Where to run.
        progress: Whether to show a bar.

    Returns:
        dict: What is in ``results.json``.

    Raises:
        ToMeError: See :func:`check`; nothing was merged.
    """
    squares, folder = check(config, images), Path(folder)
    expects, (model, handle) = config["vit_input"], _build(config, r)
    model.to(device)
    grid = (expects["size"] // expects["patch"],) * 2
    drawn = []
    for number, (name, square) in enumerate(zip(images, squares)):
        with progress_bar(1, name, "image", progress):
            sources = _sources(handle, _tensor(square, expects).to(device))
        if sources[-1] is None:
            raise ToMeError("nothing was merged, so there is nothing to draw; pass a larger --r")
        title, plain = Path(name).stem, enlarged(square, grid)
        maps = [plain if one is None else merge_map(one, grid, plain) for one in sources]
        heads = [f"block {block}: {kept}" for block, (_, kept) in enumerate(handle.tokens, 1)]
        shown = spread(len(maps), _COLUMNS)
        sheet = plots.contact_sheet(
            title,
            ["image", *(heads[block] for block in shown)],
            [("tokens left after each block", [plain, *(maps[block] for block in shown)])],
        )
        file = save_media(folder / f"{number:04d}_{title}_tokens", sheet).name
        drawn.append({"input": str(name), "tokens": handle.stats(), "sheet": file})
    options = {key: str(value) for key, value in handle.config.to_dict().items()}
    result = {"token_merging": options, "images": drawn}
    save_results(folder, result)
    print(f"Token maps of {len(drawn)} images and results.json: {folder}")
    for row in drawn:
        print(f"  {row['sheet']}")
    return result


def _build(config: Any, r: int | None) -> tuple[torch.nn.Module, ViTHandle]:
    """The model with what its config applies, or ``r``, recording where tokens go."""
    from mmengine.registry import MODELS

    model = MODELS.build(config["model"]).eval()
    handle = get_vit_handle(model)
    options = ViTConfig() if handle is None else handle.config
    if r is not None:
        options = options.replace(r=r)
    return model, apply_tome_vit(model, options, trace_source=True)


@torch.inference_mode()
def _sources(handle: ViTHandle, x: torch.Tensor) -> list[np.ndarray | None]:
    """Per block, (patches,) the token that holds each; None before anything was merged."""
    vit, patch, found = find_vit(handle.network), find_patch(handle.network, ViTPatch), []

    def note(*_: Any) -> None:
        source = patch.context.source
        found.append(None if source is None else source[0, vit.prefix :].cpu().numpy().copy())

    hooks = [block.module.register_forward_hook(note) for block in vit.blocks]
    try:
        handle.network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tensor(image: Image.Image, expects: dict[str, Any]) -> torch.Tensor:
    """(1, 3, H, W), normalized."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(expects[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((x - mean) / std)[None]
