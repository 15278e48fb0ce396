# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A stand-in with ComfyUI's public calling convention, written from its interface alone.

Clones with patches in ``model_options``, one call for cond and uncond or one for each, sigmas,
Euler's method.

Its model knows the answer: of data that is normal around a mean per condition, the denoised latent
is a weighted mean. It also has a self-attention, whose patches are called as ComfyUI's transformer
blocks call them.
"""

import copy
import uuid
from types import SimpleNamespace

import torch

SHAPE = (4, 8, 8)


class Sampling:
    """``model_sampling``: 1000 sigmas of training, and what converts them."""

    def __init__(self):
        self.sigmas = torch.linspace(-3.5, 2.7, 1000).exp()
        self.log_sigmas = self.sigmas.log()

    def calculate_input(self, sigma, x):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) ** 0.5

    def timestep(self, sigma):
        return (sigma.log()[:, None] - self.log_sigmas).abs().argmin(1)


class Flow:
    """``model_sampling`` of a flow model."""

    def calculate_input(self, sigma, x):
        return x

    def timestep(self, sigma):
        return sigma * 1000


class Model:
    """What the clones of a MODEL share."""

    def __init__(self, sampling, unet):
        self.model_sampling = sampling
        self.diffusion_model = SimpleNamespace(input_blocks=[]) if unet else SimpleNamespace()
        self.calls = self.tokens = 0

    def apply_model(self, x, sigma, c_crossattn=None, transformer_options=None, **_):
        """The denoised latent of (B, 4, 8, 8) for means (B, 4, 8, 8)."""
        self.calls += 1
        options = {**transformer_options, "original_shape": list(x.shape), "block": ("input", 1)}
        patches = options.pop("patches", {})
        tokens = context = value = x.flatten(2).transpose(1, 2)
        for patch in patches.get("attn1_patch", []):
            tokens, context, value = patch(tokens, context, value, options)
        assert tokens.shape == context.shape == value.shape
        self.tokens = tokens.shape[1]
        out = torch.softmax(tokens @ context.transpose(1, 2) / 2, dim=-1) @ value
        for patch in patches.get("attn1_output_patch", []):
            out = patch(out, options)
        squared = sigma.reshape(-1, 1, 1, 1) ** 2
        if isinstance(self.model_sampling, Flow):  # x = (1 - sigma) data + sigma noise
            level = (squared**0.5).clamp(max=0.999)
            keep = 1 - level
            x, squared = x / keep, (level / keep) ** 2
        mixed = x + 0.05 * out.transpose(1, 2).reshape(x.shape) / (1 + squared**0.5)
        return (mixed + squared * c_crossattn) / (1 + squared)


class Patcher:
    """A MODEL: clones share its model."""

    def __init__(self, sampling, unet=True):
        self.model = Model(sampling, unet)
        self.model_options = {"transformer_options": {}}

    def clone(self):
        twin = copy.copy(self)
        twin.model_options = copy.deepcopy(self.model_options)
        return twin

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    def _patch(self, name, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches.setdefault(name, []).append(patch)

    def set_model_attn1_patch(self, patch):
        self._patch("attn1_patch", patch)

    def set_model_attn1_output_patch(self, patch):
        self._patch("attn1_output_patch", patch)


def sample(model, sigmas, seed=0, cfg=3.0, batched=True, sigmas_told=True, on_step=None):
    """(1, 4, 8, 8) after Euler's steps along falling sigmas that end with 0."""
    generator = torch.Generator().manual_seed(seed)
    means = [torch.randn(1, *SHAPE, generator=generator) for _ in range(2)]
    ids = [uuid.UUID(int=number) for number in range(2)]
    x = sigmas[0] * torch.randn(1, *SHAPE, generator=generator)
    told = {"sample_sigmas": sigmas} if sigmas_told else {}
    for step, (now, after) in enumerate(zip(sigmas, sigmas[1:])):
        found = {}
        for kinds in [[1, 0]] if batched else [[0], [1]]:
            timestep = now.expand(len(kinds))
            options = {
                **model.model_options["transformer_options"],
                **told,
                "cond_or_uncond": kinds,
                "uuids": [ids[kind] for kind in kinds],
                "sigmas": now.expand(1),
            }
            c = {
                "c_crossattn": torch.cat([means[kind] for kind in kinds]),
                "transformer_options": options,
            }
            latents = torch.cat([x] * len(kinds))
            wrapper = model.model_options.get("model_function_wrapper")
            if wrapper is None:
                out = model.model.apply_model(latents, timestep, **c)
            else:
                args = {"input": latents, "timestep": timestep, "c": c, "cond_or_uncond": kinds}
                out = wrapper(model.model.apply_model, args)
            found.update(zip(kinds, out.chunk(len(kinds))))
        denoised = found[1] + cfg * (found[0] - found[1])
        x = x + (x - denoised) / now * (after - now)
        if on_step is not None:
            x = on_step(step, x)
    return x
