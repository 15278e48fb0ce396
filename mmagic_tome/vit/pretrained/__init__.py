# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers with real weights out of Python packages, for examples and benchmarks.

Needs numpy, so nothing outside of configs and scripts imports it.
"""
