# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What ``tools/benchmark.py`` does: one forward of a network, timed side by side.

===============  ================================================================
targets.py       what is run: named shapes with random weights, the demo, a config
kinds.py         what a kind of network says about itself: its shapes, how it merges
denoisers.py     UNets and diffusion transformers
vits.py          vision transformers, for pictures and clips
fits.py          whether it fits into this machine's memory, asked before it is built
attention.py     how attention is computed: diffusers processors, torch's backends
contenders.py    who runs it, each on a copy that shares its weights
rounds.py        the interleaved rounds of one case
statistics.py    ratios of paired rounds, eta, what is within noise
report.py        the table and the JSON
plot.py          the picture
cli.py           options, checks, exit codes
===============  ================================================================
"""
