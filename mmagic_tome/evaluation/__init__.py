# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluation: the dense model, token merging and fewer steps on the same prompts and seeds.

==================  =================================================================
metrics/            what is measured, usable without anything below
prompts.py          what to generate: files, built-in sets, a seed per picture
contenders.py       what is compared
plan.py             the options of a command and of a config's ``evaluation``
store.py            the folder of a run: what is done already, and what it belongs to
generate.py         makes the pictures, in fixed batches
scores.py           computes the metrics, kept per picture
timing.py           time and memory, all contenders in turn
team.py             one process or many
real.py             real pictures from a folder
results.py          everything as one dict
report/             tables, plots, the page
cli.py, command.py  ``tools/evaluate.py`` and ``python -m mmagic_tome evaluate``
==================  =================================================================
"""
