# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks of the shapes of published checkpoints, with random weights.

Time and memory of a forward depend on the shape and not on the values of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ToMeError
from ...latents import tensors_of

#: Positional and keyword arguments of a call of a network.
Arguments = tuple[tuple, dict[str, Any]]
# Timestep of a single forward, of 1000.
_MIDDLE = 500


@dataclass(frozen=True)
class Network:
    """A network that can be built by name.

    Attributes:
        make: Builds the network where torch's default device says.
        inputs: (network, (height, width) in pixels, batch, noise) -> a function that returns the
            arguments of a call at a timestep of 1000; ``noise(*shape)`` draws Gaussian numbers.
        size: Default height and width in pixels.
        batch: Default batch of the network; of a denoiser 2 is one image with guidance.
        unit: Pixels that height and width must be multiples of.
        denoises: Whether it runs step after step, at falling timesteps.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[..., Callable[[int], Arguments]]
    size: int = 512
    batch: int = 2
    unit: int = 8
    denoises: bool = True

    def build(self, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
        """The network with random weights, in eval mode and without gradients.

        Weights are made where they stay, in their final precision, so building takes no more memory
        than the network itself.
        """
        with torch.device("meta"):
            network = self.make()
        # Not diffusers' own ``to``, which warns of precisions that matter with real weights only.
        network = nn.Module.to(network, dtype).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(0)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                # About unit variance from layer to layer: nothing overflows in half precision, and
                # nothing becomes so small that a CPU slows down on it.
                bound = (3 / max(1, tensor[0].numel())) ** 0.5 if tensor.dim() > 1 else 0.1
                tensor.data.uniform_(-bound, bound, generator=generator)
        for module in network.modules():
            if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
                module.weight.data.fill_(1)  # a norm
        return network.eval().requires_grad_(False)


@dataclass
class Work:
    """A network and the calls of it that are one measurement.

    Attributes:
        network: The baseline; it is not changed.
        calls: Arguments of each.
        scheduler: Whose timesteps the calls have; None for a single call.
        size: (height, width) in pixels.
    """

    network: nn.Module
    calls: list[Arguments]
    scheduler: Any
    size: tuple[int, int]

    def __call__(self, network: nn.Module) -> Tensor:
        """Run a copy of the network: the mean of its outputs."""
        total = None
        for args, kwargs in self.calls:
            output = tensors_of(network(*args, **kwargs))[0]
            total = output if total is None else total + output
        return total / len(self.calls) if len(self.calls) > 1 else total


def share_weights(network: nn.Module) -> nn.Module:
    """A copy of a network with hooks and sub-modules of its own and the same weights."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


class NetworkWork:
    """Work on a network by name, built once per dtype.

    Args:
        name, network: An entry of :data:`~.NETWORKS`.
        device: Where to build it.
        steps: Calls at so many falling timesteps; 1 is a single forward.
        sizes, batches: To be asked for. Default: the network's own.

    Raises:
        ToMeError: A size that does not fit; steps of a network that does not denoise.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        device: torch.device,
        steps: int,
        sizes: Sequence[tuple[int, int]] | None,
        batches: Sequence[int] | None,
    ) -> None:
        self.entry, self.device, self.steps = network, device, steps
        self.sizes = sizes or [(network.size, network.size)]
        self.batches = batches or [network.batch]
        self._built: dict[torch.dtype, nn.Module] = {}
        if steps > 1 and not network.denoises:
            raise ToMeError(f"{name} has no denoising steps; write steps=1")
        unit = network.unit
        for height, width in self.sizes:
            if height % unit or width % unit:
                near = "x".join(str(max(unit, round(n / unit) * unit)) for n in (height, width))
                raise ToMeError(
                    f"size {height}x{width} does not fit {name}: height and width must be "
                    f"multiples of {unit}; the nearest is {near}"
                )

    def __call__(self, size: tuple[int, int], batch: int, dtype: torch.dtype | None) -> Work:
        """The work of one case; ``dtype`` defaults to float32."""
        dtype = dtype or torch.float32
        if dtype not in self._built:
            self._built.clear()
            self._built[dtype] = self.entry.build(self.device, dtype)
        network = self._built[dtype]
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, dtype)

        inputs = self.entry.inputs(network, size, batch, noise)
        if self.steps == 1:
            return Work(network, [inputs(_MIDDLE)], None, size)
        times = [round(1000 * (1 - step / self.steps)) - 1 for step in range(self.steps)]
        scheduler = SimpleNamespace(timesteps=torch.tensor(times))
        return Work(network, [inputs(time) for time in times], scheduler, size)
