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
cli.py         ``tools/visualize.py``: its options; ``command.py``: what it does
=============  ===================================================================
"""
