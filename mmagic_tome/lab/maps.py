# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which tokens merge in a run, and how that is painted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from ..errors import ToMeError
from ..handle import ToMeHandle
from ..patch import find_patch
from ..tome.state import TomePatch
from .methods import Method
from .plots import contact_sheet
from .results import RunFolder
from .runners.base import Runner
from .runners.media import evenly, save_media
from .scores import image_rows

# Of a sheet; evenly spread.
MOST_BLOCKS, MOST_STEPS = 8, 4

# Pixels per token at least: borders would hide smaller ones.
_TOKEN = 6
# Of 255 levels: borders on brighter colours are grey, on others white.
_BRIGHT, _GREY = 190, 150.0


@dataclass(frozen=True)
class Record:
    """The merge plan of one block at one step."""

    step: int  #: from 0
    block: str  #: dotted path
    grid: tuple[int, int]  #: (height, width) in tokens
    #: (N,) int32, the merged token that holds each token, in rows of the grid; of the last image in
    #: the network's batch, which with guidance is the one with the prompt.
    slot: np.ndarray

    @property
    def kept(self) -> int:
        """Number of tokens after merging."""
        return int(self.slot.max()) + 1


def merged_blocks(handle: ToMeHandle, most: int | None = None) -> dict[str, nn.Module]:
    """The blocks in which tokens are merged, by dotted path, in running order; ``most`` of them at
    most, evenly spread. Default: None, all."""
    found = []
    for name, network in handle.networks.items():
        patch = find_patch(network, TomePatch)
        merged = {block.name for block in patch.blocks}
        for block in patch.adapter.blocks(network):
            if block.name in merged:
                found.append((f"{name}.{block.name}" if name else block.name, block.module))
    return dict(found[place] for place in evenly(len(found), most or len(found)))


class Recorder:
    """Records the merge plans of blocks in one run, inside a with statement.

    Pass :meth:`next_step` to the run as ``on_step``. Compiled networks cannot be recorded.

    Args:
        blocks: Some of :func:`merged_blocks`.

    Attributes:
        records: One :class:`Record` per block and step at which it merged, in running order; of
            a block whose targets have different plans, the plan of the first.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self.blocks, self.records = blocks, []
        self._step, self._stack = 0, contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        for name, block in self.blocks.items():
            # After merging's own hook, which has made the plan by then.
            hook = block.register_forward_pre_hook(partial(self._note, name))
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def next_step(self) -> None:
        """What is recorded belongs to the next step from now on."""
        self._step += 1

    def _note(self, name: str, block: nn.Module, args: tuple) -> None:
        hooks = block._forward_pre_hooks.values()
        patches = (getattr(hook, "patch", None) for hook in hooks)
        patch = next((one for one in patches if isinstance(one, TomePatch)), None)
        plan = None if patch is None else patch.context.plan
        slots = None if plan is None else plan.slot
        if slots is not None and plan.num_slots < slots.shape[1]:
            slot = slots[-1].detach().to("cpu", torch.int32).numpy()
            self.records.append(Record(self._step, name, tuple(patch.context.grid), slot))


def draw_maps(runner: Runner, method: Method, folder: RunFolder) -> None:
    """Run a method that merges on every image once more, and write what merged: a sheet beside each
    of its images in a folder."""
    rows = image_rows(folder)
    for number, prompt in enumerate(runner.request.prompts):
        file = folder.path / rows[method.name, number]["file"]
        with contextlib.ExitStack() as stack:
            handles = stack.enter_context(method.on(runner.model))
            blocks = merged_blocks(handles.tome, MOST_BLOCKS)
            recorder = stack.enter_context(Recorder(blocks))
            runner.run([number], method.steps, recorder.next_step)
        sheet = merge_sheet(prompt, recorder.records, Image.open(file))
        save_media(file.with_name(f"{file.stem}_merge"), sheet)


# --- painting -------------------------------------------------------------------------------------


def enlarged(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """An image in RGB, enlarged by a whole factor until a token of a grid has six pixels a side."""
    factor = max(1, -(-_TOKEN * grid[0] // image.height), -(-_TOKEN * grid[1] // image.width))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def merge_map(slot: np.ndarray, grid: tuple[int, int], image: Image.Image) -> Image.Image:
    """Paint groups of merged tokens over an image, in their mean colour and with a border; a token
    that is alone shows the image. After "Token Merging: Your ViT But Faster" (arXiv 2210.09461),
    figure 4.

    Args:
        slot: (height * width,) the merged token that holds each token, in rows of the grid.
        grid: (height, width) in tokens.
        image: That the grid covers; see :func:`enlarged`.
    """
    pixels = np.asarray(image.convert("RGB"), np.float64)
    rows = np.arange(image.height) * grid[0] // image.height
    columns = np.arange(image.width) * grid[1] // image.width
    labels = slot.reshape(grid)[rows[:, None], columns]
    merged = (np.bincount(slot) > 1)[labels]
    groups = np.arange(slot.max() + 1)
    means = [ndimage.mean(channel, labels, groups) for channel in np.moveaxis(pixels, 2, 0)]
    painted = np.where(merged[..., None], np.stack(means, axis=1)[labels], pixels)
    # Left of or above another group, if one of the two is merged.
    border = np.zeros(labels.shape, bool)
    border[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & (merged[:, :-1] | merged[:, 1:])
    border[:-1] |= (labels[:-1] != labels[1:]) & (merged[:-1] | merged[1:])
    bright = painted.mean(axis=2, keepdims=True) > _BRIGHT
    painted[border] = np.where(bright, _GREY, 255.0)[border]
    return Image.fromarray(painted.round().astype(np.uint8))


def merge_sheet(title: str, records: Sequence[Record], image: Image.Image) -> Image.Image:
    """Draw merge maps over an image: a row per block, a column for each of four steps at most.

    Raises:
        ToMeError: There is none.
    """
    if not records:
        raise ToMeError(
            "nothing was merged in this run, so there is nothing to draw: grids are too small or "
            "the options merge nothing; pass a larger --size or --ratio"
        )
    steps = sorted({record.step for record in records})
    steps = [steps[place] for place in evenly(len(steps), MOST_STEPS)]
    found = {(record.block, record.step): record for record in records}
    image = enlarged(image, max(record.grid for record in records))
    rows = []
    for block in dict.fromkeys(record.block for record in records):
        own = [record for record in records if record.block == block]
        kept = sorted(record.kept for record in own)
        ends = "-".join(map(str, dict.fromkeys([kept[0], kept[-1]])))
        at = [found.get((block, step)) for step in steps]
        # The image itself where nothing was merged.
        maps = [image if one is None else merge_map(one.slot, one.grid, image) for one in at]
        rows.append((f"{block}: {own[0].slot.size} to {ends} tokens", maps))
    return contact_sheet(title, [f"step {step + 1}" for step in steps], rows)
