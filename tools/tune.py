# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Tuning is not here yet: tools/evaluate.py compares settings."""

from _start import start

if __name__ == "__main__":
    start("tune")
