# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging at work: hooks on a network's grids, blocks and targets.

==============  ===============================================================
state.py        what the hooks of one network share, and for how long
network.py      a call of the network: its step, its run, its token grid
block.py        plans of a block, and how long they are reused
place.py        which blocks and targets, and the hooks on them
target.py       merge what goes into a target, unmerge what comes out
==============  ===============================================================
"""
