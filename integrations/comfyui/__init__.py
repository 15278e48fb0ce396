# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A custom node for ComfyUI: step caching and token merging for a MODEL (docs/howto/comfyui.md)."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
