# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluations of the toy model."""

from toy_runner import ToySource, toy_request

from mmagic_tome.lab.evaluate import evaluate
from mmagic_tome.lab.methods import Method, parse_method

HALF = Method.from_dict(dict(name="half", tome_cfg=dict(ratio=0.5)))
CACHED = Method.from_dict(dict(name="Cached!", cache_cfg=dict(region="network")))
FEWER = Method("3 steps", steps=3)
TOLERANT = parse_method("tolerance:0.5")
METHODS = [HALF, CACHED, FEWER]
METRICS = ["psnr", "ssim", "latent_error"]


def run(folder, methods=METHODS, metrics=METRICS, rounds=0, source=None, **options):
    """Evaluate; return the table."""
    request = options.pop("request", None) or toy_request()
    source = source or ToySource()
    return evaluate(source, request, methods, metrics, rounds, folder, progress=False, **options)
