# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pictures of what token merging does.

=============  ===================================================================
recorder.py    remembers which tokens became one, per step and block
merge_map.py   groups of merged tokens painted over a picture
error_map.py   where a merged picture differs from the dense one
cost_plot.py   time of each site, dense and merged
token_maps.py  groups of a vision transformer: over pictures, clips, recordings
vit_command.py ``tools/visualize.py --input``
sheets.py      many merge maps as one sheet, and as a GIF
backend.py     ``ToMeVisBackend``: merge maps from mmengine's visualizer
cli.py         ``tools/visualize.py``: its options; ``command.py``: what it does
=============  ===================================================================
"""

import functools

__all__ = ["connect"]


def connect():
    """Show a runner's model to its backends: a visualizer is built before the model is."""
    from mmengine.runner.runner import Runner

    build_model = Runner.build_model
    if getattr(build_model, "shows_model", False):
        return

    @functools.wraps(build_model)
    def build_and_show(self, model):
        built = build_model(self, model)
        backends = getattr(getattr(self, "visualizer", None), "_vis_backends", None) or {}
        for backend in backends.values():
            if hasattr(backend, "watch_model"):
                backend.watch_model(built)
        return built

    build_and_show.shows_model = True
    Runner.build_model = build_and_show
