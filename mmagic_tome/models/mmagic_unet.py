# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's own ``DenoisingUnet`` with ``unet_type='stable'``."""

from __future__ import annotations

from torch import nn

from .base import is_a
from .diffusers_unet import DiffusersUNet


class MMagicUNet(DiffusersUNet):
    """MMagic's ``DenoisingUnet``: laid out like a diffusers UNet, with other argument names."""

    context_argument = "context"
    description = "MMagic's DenoisingUnet (unet_type='stable')"
    class_names = ("DenoisingUnet",)
    timestep_name = "t"

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, *self.class_names) and super().matches(module)
