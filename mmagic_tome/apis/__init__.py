# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Commands of the package and what they are made of.

Importing this subpackage is cheap: MMagic and diffusers are imported when a
function needs them.
"""

from .assets import asset_path

__all__ = ["asset_path"]
