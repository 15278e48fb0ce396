# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Measuring: the same prompts through the baseline and any setting, then figures.

===============  =================================================================
request.py       what to generate: prompts, images, masks, steps, guidance, seeds
runners/         a MMagic model or a diffusers pipeline: request in, images out
methods.py       what is compared: the baseline, settings, tomesd, DeepCache, fewer steps
measure.py       clock, interleaved rounds, intervals, memory, FLOPs
metrics/         fidelity and quality of images, by name
results.py       the folder of a run: a manifest, rows, images
infer.py, evaluate.py, benchmark.py, tune.py    what the commands do
maps.py          which tokens merge, painted over images
networks.py      what the benchmark times
report.py        tables, plots and the report, from the rows of a folder
cli.py           the commands; options.py: their options
===============  =================================================================
"""
