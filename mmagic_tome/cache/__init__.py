# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caching: at some steps part of the network is skipped and its output extrapolated.

A network's output changes smoothly along a denoising run. Linear multistep solvers use that for
differential equations (Adams and Bashforth); DeepCache (arXiv 2312.00858) reuses the features of a
UNet's inner levels, TaylorSeer (arXiv 2503.06923) extrapolates those of a transformer.
"""

from .config import PRESETS, StepCacheConfig, coerce_cache, to_plain

__all__ = ["PRESETS", "StepCacheConfig", "coerce_cache", "to_plain"]
