# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The token grid of a packed image, read from its position ids."""

from __future__ import annotations

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ToMeError

# Ids tensor -> (version, grid). Pipelines build the tensor once per image, so the grid is read,
# which synchronizes with the device, once per image instead of at every step.
_known_grids = WeakTensorKeyDictionary()


@_disable_dynamo  # as torch.compiler.disable, without importing the compiler now
def grid_of_ids(ids: Tensor) -> tuple[int, int]:
    """Return (height, width) in tokens; cached as long as the tensor lives unchanged.

    Args:
        ids: (N, 3+) or (B, N, 3+): index of the image, row and column of every token.

    Raises:
        ToMeError: the tokens are not those of one image, row by row (as with reference images in
            the same sequence).
    """
    version = None if ids.is_inference() else ids._version
    known = _known_grids.get(ids)
    if known is None or known[0] != version:
        known = _known_grids[ids] = (version, _read_grid(ids))
    return known[1]


def _read_grid(ids: Tensor) -> tuple[int, int]:
    # From the period of the rows, not from the largest id: half precision rounds large integers.
    positions = (ids[0] if ids.dim() == 3 else ids).detach().float().cpu()
    tokens = positions.shape[0]
    changes = (positions[:, 1] != positions[0, 1]).nonzero()
    width = int(changes[0]) if len(changes) else tokens
    if tokens % width == 0:
        rows = positions.view(-1, width, positions.shape[1])
        same_image = (rows[..., 0] == positions[0, 0]).all()
        if same_image and (rows[..., 1] == rows[:, :1, 1]).all():
            falls = (rows[1:, 0, 1] < rows[:-1, 0, 1]).any()
            if not falls and (rows[..., 2] == rows[:1, :, 2]).all():
                return rows.shape[0], width
    raise ToMeError(
        f"the {tokens} tokens of img_ids are not one image row by row (reference images in the "
        "same sequence?), so there is no grid to merge on; call the model without token merging"
    )
