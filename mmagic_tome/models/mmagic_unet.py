# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's own ``DenoisingUnet`` with ``unet_type='stable'``.

It is laid out like a diffusers UNet and differs in what its arguments are called.
"""

from __future__ import annotations

from torch import nn

from .diffusers_unet import DiffusersUNet


class MMagicUNet(DiffusersUNet):
    """Host for MMagic's native ``DenoisingUnet``; same blocks and sites as diffusers'."""

    context_argument = "context"
    description = "MMagic's DenoisingUnet (unet_type='stable')"
    timestep_name = "t"

    def matches(self, module: nn.Module) -> bool:
        # By name, so that MMagic need not be installed for the question to be asked.
        is_native = any(base.__name__ == "DenoisingUnet" for base in type(module).__mro__)
        return is_native and super().matches(module)
