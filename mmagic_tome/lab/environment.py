# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where and with what figures were measured."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

_MODELS = ("torch", "diffusers", "transformers", "timm", "mmagic", "mmengine", "mmcv", "mmcv-lite")
_PACKAGES = (*_MODELS, "numpy", "tomesd", "DeepCache")


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return what times and images depend on besides the settings, as JSON has it: ``versions`` of
    the packages that are installed, ``platform``, ``processor``, ``cpus`` (cores), ``threads``
    (torch's), ``gpu`` (None on a CPU); on CUDA ``gpu_memory`` (bytes) and ``cuda`` (version)."""
    versions = {"mmagic_tome": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = torch.device(device)
    found: dict[str, Any] = {
        "versions": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    """The processor's name, or its architecture where the system tells no more."""
    with suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
