# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluation: metrics, and the paired runs that they judge."""
