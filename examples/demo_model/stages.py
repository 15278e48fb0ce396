"""The stages of training and the recipes made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from common import ToolError


@dataclass
class Stage:
    """One stretch of training; it ends after `steps`, or after `minutes` where they are given."""

    name: str
    steps: int = 0
    minutes: float = 0.0
    batch: int = 16
    micro: int = 0  # images a worker takes at a time; 0: the whole batch
    lr: float = 1e-3
    lr_end: float = 0.0
    warmup: int = 100
    size: int = 128  # image size in pixels; with `sizes`, the one that is sampled
    sizes: tuple[int, ...] = ()  # several sizes: every step draws one of them (UNet)
    size_weights: tuple[float, ...] = ()  # how often each is drawn; (): equally often
    size_batches: tuple[int, ...] = ()  # images per step of each size; (): `batch` (DiT)
    ema: float = 0.995
    late: float = 0.75  # below 1: more training at high noise (UNet stages)
    perceptual: float = 0.02  # weight of the feature loss (VAE stages)
    merge: float = 0.0  # ratio of token merging in the self-attention of the finest level (UNet)
    merge_share: float = 1.0  # fraction of the steps of size `size` that merge
    compile: bool = False  # torch.compile the network (DiT)

    def __post_init__(self) -> None:
        self.sizes, self.size_weights = tuple(self.sizes), tuple(self.size_weights)
        self.size_batches = tuple(self.size_batches)
        if self.size_batches and len(self.size_batches) != len(self.sizes):
            raise ToolError(
                f"{self.name}: {len(self.size_batches)} size batches for {len(self.sizes)} sizes"
            )
        if self.size_weights and len(self.size_weights) != len(self.sizes):
            raise ToolError(
                f"{self.name}: {len(self.size_weights)} size weights for {len(self.sizes)} sizes"
            )
        if self.size_weights and (min(self.size_weights) < 0 or not sum(self.size_weights)):
            raise ToolError(f"{self.name}: size weights {self.size_weights}: none may be negative")
        if self.sizes and self.size not in self.sizes:
            self.size = max(self.sizes)

    def draw(self, step: int, seed: int = 0) -> tuple[int, float]:
        """Image size and merge ratio of a step; the same ones whenever the step is repeated."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + 63)
        size = self.size
        if self.sizes:
            weights = torch.tensor(self.size_weights or (1,) * len(self.sizes), dtype=torch.float)
            size = self.sizes[int(torch.multinomial(weights, 1, generator=generator))]
        merged = torch.rand(1, generator=generator).item() < self.merge_share
        return size, self.merge if merged and size == self.size else 0.0

    def batch_at(self, size: int) -> int:
        """Images per step at this image size."""
        return self.size_batches[self.sizes.index(size)] if self.size_batches else self.batch

    def progress(self, step: int, seconds: float) -> float:
        """0 to 1; the learning rate follows it, so that the end of the stage is always reached."""
        parts = [step / self.steps] if self.steps else []
        if self.minutes:
            parts.append(seconds / (60 * self.minutes))
        return min(1.0, max(parts))

    def learning_rate(self, step: int, seconds: float) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress(step, seconds))
        return min(1.0, (step + 1) / self.warmup) * (self.lr_end + (self.lr - self.lr_end) * cosine)


RECIPES = {
    "cpu": [
        Stage("vae", minutes=5, batch=16, micro=4, lr=5e-4, warmup=40, size=64, ema=0.98),
        Stage("unet_64", minutes=15, batch=24, micro=6, lr=1.2e-3, lr_end=6e-4, size=64),
        Stage("unet_64_2", minutes=19, batch=24, micro=12, lr=9e-4, lr_end=3e-4, size=64, late=0.6),
        Stage(
            "unet_128",
            minutes=22,
            batch=16,
            micro=4,
            lr=4e-4,
            warmup=30,
            size=128,
            late=0.6,
            ema=0.99,
        ),
        Stage(
            "unet_128_2",
            minutes=20,
            batch=16,
            micro=4,
            lr=4e-4,
            lr_end=2e-4,
            warmup=30,
            size=128,
            late=0.6,
            ema=0.99,
        ),
        Stage(
            "unet_128_3",
            minutes=20,
            batch=16,
            micro=4,
            lr=3e-4,
            warmup=30,
            size=128,
            late=0.65,
            ema=0.995,
        ),
        Stage("decoder", minutes=2.5, batch=16, micro=4, lr=4e-4, warmup=20, size=64, ema=0.97),
    ],
    "gpu": [
        Stage("vae", steps=6000, batch=64, lr=1e-3, size=64, ema=0.998),
        Stage("unet_128", steps=20000, batch=64, lr=8e-4, lr_end=4e-4, size=128, ema=0.999),
        Stage("unet_256", steps=6000, batch=32, lr=4e-4, size=256, ema=0.999),
        Stage("decoder", steps=3000, batch=64, lr=5e-4, size=64, ema=0.998),
    ],
}

# From the weights of "cpu" on. A network that has only seen 32x32 latents finds the middle of a
# 64x64 image no more: 40 minutes of these stages gave outlines in place, not details.
RECIPES["cpu_256"] = [
    *RECIPES["cpu"][:-1],
    # 4096 tokens: with half of them merged a step takes a little over half the time. The last
    # stage is dense, so that the weights end adapted to attention over all tokens.
    Stage(
        "unet_256_merged",
        minutes=240,
        batch=8,
        micro=2,
        lr=3e-4,
        lr_end=2e-4,
        warmup=30,
        size=256,
        late=0.6,
        ema=0.99,
        merge=0.5,
    ),
    Stage(
        "unet_256",
        minutes=90,
        batch=8,
        micro=2,
        lr=2e-4,
        warmup=20,
        size=256,
        late=0.6,
        ema=0.99,
    ),
    RECIPES["cpu"][-1],
]

# Continues from the shipped weights (--start-from) on one core. Mixing the sizes retains 128 px
# while 256 px is learned. Three in four steps at 256 px merge, which saves a quarter of the time;
# the dense ones keep the weights accurate without merging. Steps are counted instead of minutes,
# since a process of low priority does not know how much of a core it gets. The second stage is
# dense and lowers the learning rate to zero.
MIXED = Stage(
    "unet_mixed",
    steps=8_000,
    batch=8,
    micro=2,
    lr=3e-4,
    lr_end=2e-4,
    warmup=200,
    size=256,
    sizes=(128, 256),
    size_weights=(1, 2),
    late=0.6,
    ema=0.999,
    merge=0.5,
    merge_share=0.75,
)
RECIPES["mixed"] = [
    MIXED,
    replace(MIXED, name="unet_mixed_2", steps=1500, lr_end=0.0, warmup=20, merge=0.0),
]

# The last stage of the mixed sizes, from --start-from on: an average of the weights before and
# after them (average.py), since learning 256 px cost some of what was known at 128 px.
RECIPES["last"] = [
    replace(
        MIXED,
        name="unet_last",
        steps=1200,
        lr=2e-4,
        lr_end=0.0,
        warmup=100,
        size_weights=(2, 1),
        merge=0.0,
    )
]

# The diffusion transformer, on one core. A step at 64 px (64 tokens) costs a tenth of one at 256 px
# for the same images: what captions mean is learned there, and the other sizes follow.
DIT = Stage("dit_64", steps=3000, batch=32, lr=1e-3, lr_end=1e-3, warmup=200, size=64, ema=0.999)
DIT_MIXED = replace(
    DIT,
    name="dit_mixed",
    steps=60_000,
    warmup=100,
    size=256,
    sizes=(64, 128, 256),
    size_weights=(3, 4, 3),
    size_batches=(32, 12, 4),
    lr_end=5e-4,
)
RECIPES["dit"] = [
    DIT,
    DIT_MIXED,
    replace(DIT_MIXED, name="dit_mixed_2", steps=8000, warmup=20, lr=5e-4, lr_end=0.0),
]
