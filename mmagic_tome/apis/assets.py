# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where the package's own data and configs are, in a checkout and in a wheel."""

from pathlib import Path

from ..assets import asset_path as asset_path

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
