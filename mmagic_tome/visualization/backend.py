# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeVisBackend``: merge maps beside the pictures that a runner's visualizer is given.

In a config::

    vis_backends = [dict(type="LocalVisBackend"), dict(type="ToMeVisBackend")]
    visualizer = dict(type="ConcatImageVisualizer", vis_backends=vis_backends, ...)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import VISBACKENDS
from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env
from PIL import Image

from ..apis.pictures import ResultFolder
from ..errors import ToMeError
from .recorder import PlanRecorder
from .sheets import merge_sheet


@VISBACKENDS.register_module()
class ToMeVisBackend(BaseVisBackend):
    """Writes, for every picture that it is given, a sheet of the last run's merge maps over it.

    A runner shows its model to the backend by itself; elsewhere call :meth:`watch_model`. A
    picture of another shape than the token grids (several side by side, say) and a model that
    merged nothing since the last time leave no sheet.

    Args:
        save_dir: folder; the sheets go to ``<save_dir>/<folder>/<name>_<step>.png``.
        folder: Default ``'merge_maps'``.
        columns: steps that a sheet shows, evenly spread over the run; at least 1. Default: 4.
        entry: which entry of the network's batch is shown; -1, the default, is the last, which
            with classifier-free guidance is the one with the prompt.
    """

    def __init__(
        self, save_dir: str, folder: str = "merge_maps", columns: int = 4, entry: int = -1
    ) -> None:
        super().__init__(save_dir)
        if not isinstance(columns, int) or columns < 1:
            raise ToMeError(f"columns={columns!r} of ToMeVisBackend: write 1 or more")
        self.folder = Path(save_dir or ".", folder)
        self.columns, self.entry = columns, entry
        self.recorder: PlanRecorder | None = None

    def _init_env(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    @force_init_env
    def experiment(self) -> ToMeVisBackend:
        """Itself."""
        return self

    def watch_model(self, model: object) -> None:
        """Record the plans of a model from now on; one that cannot be merged is ignored."""
        self.close()
        try:
            self.recorder = PlanRecorder(model)
        except ToMeError:
            return
        self.recorder.__enter__()

    @force_init_env
    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        """Write the sheet of one picture.

        Args:
            name: of the picture; what is no letter, digit, dot or dash becomes ``_``.
            image: (H, W, 3) uint8, RGB.
            step: goes into the file's name.
        """
        records = self.recorder.records if self.recorder is not None else []
        height, width = image.shape[:2]
        records = [
            record
            for record in records
            if height * record.grid[1] == width * record.grid[0] and height >= record.grid[0]
        ]
        if not records:
            return
        picture = Image.fromarray(np.ascontiguousarray(image[..., :3], np.uint8))
        sheet = merge_sheet(name, records, picture, self.columns, self.entry)
        safe = re.sub(r"[^\w.-]", "_", name)
        ResultFolder(self.folder).save_png(f"{safe}_{step}.png", sheet, {"name": name})

    def close(self) -> None:
        """Stop recording."""
        if self.recorder is not None:
            self.recorder.__exit__()
            self.recorder = None
