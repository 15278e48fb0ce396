#!/usr/bin/env python
"""Train the demo model: VAE, cached latents, UNet and text encoder together, then the decoder.

Run prepare_data.py first. Every stage writes a checkpoint every few minutes; the same command run
again goes on from the last one. Loss curves and sample sheets lie in WORK_DIR.

Recipes
  cpu   two cores, about two hours: most steps on 64 and 128 px pictures, in resumable pieces
  cpu_256  the same and about six hours more on 256 px pictures (4096 tokens)
  gpu   one large GPU, under 25 minutes: bf16, finishing on 256 px pictures
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import DEFAULT_WORK_DIR, ToolError, run_tool, save_json, write_atomically
from tqdm import tqdm


@dataclass
class Stage:
    """One stretch of training; it ends after `steps`, or after `minutes` where they are given."""

    name: str
    steps: int = 0
    minutes: float = 0.0
    batch: int = 16
    micro: int = 0  # pictures a worker takes at a time; 0: the whole batch
    lr: float = 1e-3
    lr_end: float = 0.0
    warmup: int = 100
    size: int = 128  # picture size in pixels
    ema: float = 0.995
    late: float = 0.75  # below 1: more training at high noise (UNet stages)
    perceptual: float = 0.02  # weight of the feature loss (VAE stages)
    merge: float = 0.0  # ratio of token merging in the self-attention of the finest level (UNet)

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
# 64x64 picture no more: 40 minutes of these stages gave outlines in place, not details.
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

LONGEST_STEP = 60.0  # seconds; what a step takes beyond this is a pause


@dataclass
class State:
    """What a checkpoint holds besides the weights."""

    step: int = 0
    seconds: float = 0.0
    losses: list = field(default_factory=list)  # [step, seconds, mean loss]


class Trainer:
    """Runs one stage: schedule, EMA, checkpoints, log.

    `loss_fn(generator, step, part, parts)` is all that differs between stages. The generator is
    seeded by (seed, step, part), so a resumed run sees the same random numbers.

    With `workers=2` a second process shares the weights and both take parts of the batch from one
    queue. On a CPU that others use too this is far faster than two threads in one process, where
    every operation waits for the slower thread.
    """

    def __init__(
        self, stage, modules, loss_fn, work_dir, device, checkpoint_minutes=5.0, seed=0, workers=1
    ):
        self.stage, self.modules, self.loss_fn = stage, modules, loss_fn
        self.device = torch.device(device)
        self.folder = Path(work_dir)
        self.path = self.folder / "checkpoints" / f"{stage.name}.pt"
        self.checkpoint_minutes = checkpoint_minutes
        self.seed = seed
        self.parts = math.ceil(stage.batch / stage.micro) if stage.micro else 1
        self.workers = min(workers, self.parts) if self.device.type == "cpu" else 1
        self.state = State()
        common.repair_torchvision()
        from diffusers.training_utils import EMAModel

        if self.workers > 1:
            for module in modules.values():
                module.share_memory()
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.ema = EMAModel(self.parameters, decay=stage.ema, foreach=True)
        self._helpers = []

    def save(self) -> None:
        checkpoint = {
            "state": asdict(self.state),
            "stage": asdict(self.stage),
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        write_atomically(self.path, lambda p: torch.save(checkpoint, p))
        save_json(
            self.folder / "logs" / f"{self.stage.name}.json",
            {"stage": asdict(self.stage), **asdict(self.state)},
        )

    def resume(self) -> bool:
        if not self.path.is_file():
            return False
        checkpoint = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(checkpoint["modules"][name])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.ema.to(self.device)
        self.state = State(**checkpoint["state"])
        return True

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the modules hold the averaged weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @property
    def finished(self) -> bool:
        return self.stage.progress(self.state.step, self.state.seconds) >= 1

    # ---- the parts of one batch, shared between processes

    def _take_parts(self, step: int, next_part) -> float:
        total = 0.0
        while (part := next_part()) < self.parts:
            generator = torch.Generator()
            generator.manual_seed((self.seed * 1_000_003 + step) * 64 + part)
            loss = self.loss_fn(generator, step, part, self.parts) / self.parts
            loss.backward()
            total += loss.item()
        return total

    def _start_helpers(self) -> None:
        import torch.multiprocessing as mp

        context = mp.get_context("fork")  # the helpers inherit models and data as they are
        size = sum(p.numel() for p in self.parameters)
        self._counter = context.Value("l", 0)
        self._step = context.Value("l", 0)
        self._begin = context.Barrier(self.workers)
        self._end = context.Barrier(self.workers)
        self._gradients = [torch.zeros(size).share_memory_() for _ in range(self.workers - 1)]
        self._losses = torch.zeros(self.workers - 1).share_memory_()
        for i in range(self.workers - 1):
            process = context.Process(target=self._help, args=(i,), daemon=True)
            process.start()
            self._helpers.append(process)

    def _next_part(self) -> int:
        with self._counter.get_lock():
            self._counter.value += 1
            return self._counter.value - 1

    def _help(self, index: int) -> None:
        import signal
        import threading

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        flat = self._gradients[index]
        with contextlib.suppress(threading.BrokenBarrierError):
            while True:
                self._begin.wait()
                if self._step.value < 0:
                    return
                self._losses[index] = self._take_parts(self._step.value, self._next_part)
                offset = 0
                for p in self.parameters:
                    view = flat[offset : offset + p.numel()]
                    if p.grad is None:
                        view.zero_()
                    else:
                        # In the order of the memory, which parameter and gradient may not share.
                        view.view(p.shape).copy_(p.grad)
                    p.grad = None
                    offset += p.numel()
                self._end.wait()

    def _stop_helpers(self) -> None:
        if self._helpers:
            self._step.value = -1
            with contextlib.suppress(Exception):
                self._begin.wait(timeout=60)
            for process in self._helpers:
                process.join(timeout=10)
            self._helpers = []

    def _loss_and_gradients(self) -> float:
        step = self.state.step
        if not self._helpers:
            parts = iter(range(self.parts + 1))
            return self._take_parts(step, lambda: next(parts))
        self._step.value, self._counter.value = step, 0
        self._begin.wait()
        loss = self._take_parts(step, self._next_part)
        self._end.wait(timeout=600)
        for flat in self._gradients:
            offset = 0
            for p in self.parameters:
                gradient = flat[offset : offset + p.numel()].view(p.shape)
                p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)
                offset += p.numel()
        return loss + self._losses.sum().item()

    def run(self, on_checkpoint=None, max_steps: int | None = None) -> None:
        stage, state = self.stage, self.state
        bar = tqdm(total=stage.steps or None, initial=state.step, desc=stage.name, mininterval=10)
        last_save = last_sheet = time.monotonic()
        sheet_seconds = 0.0
        recent: list[float] = []
        done = 0
        if self.workers > 1:
            self._start_helpers()
        try:
            while not self.finished and (max_steps is None or done < max_steps):
                began = time.monotonic()
                for group in self.optimizer.param_groups:
                    group["lr"] = stage.learning_rate(state.step, state.seconds)
                loss = self._loss_and_gradients()
                if not math.isfinite(loss):
                    raise ToolError(f"{stage.name}: the loss became {loss} at step {state.step}")
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                # Early on, the average is over the few steps there are.
                self.ema.decay = min(stage.ema, (state.step + 1) / (state.step + 10))
                self.ema.step(self.parameters)
                state.step += 1
                done += 1
                # A process that was stopped for a while did not train for that while.
                state.seconds += min(time.monotonic() - began, LONGEST_STEP)
                recent.append(loss)
                bar.update()
                if len(recent) == 20 or self.finished:
                    mean = sum(recent) / len(recent)
                    state.losses.append([state.step, round(state.seconds, 1), round(mean, 6)])
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    recent.clear()
                if time.monotonic() - last_save > 60 * self.checkpoint_minutes:
                    self.save()
                    last_save = time.monotonic()
                    # Sample sheets take a tenth of the time at most.
                    if on_checkpoint and last_save - last_sheet > 10 * sheet_seconds:
                        with self.averaged():
                            on_checkpoint(self)
                        last_sheet = time.monotonic()
                        sheet_seconds = last_sheet - last_save
        finally:
            self._stop_helpers()
            bar.close()
        self.save()
        if on_checkpoint:
            with self.averaged():
                on_checkpoint(self)


def load_averaged(checkpoint: Path, *modules) -> None:
    """Put the averaged weights of a checkpoint into modules that were built anew."""
    from diffusers.training_utils import EMAModel

    if not checkpoint.is_file():
        raise ToolError(f"{checkpoint} is not there: run its stage first")
    parameters = [p for m in modules for p in m.parameters()]
    ema = EMAModel(parameters)
    ema.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"])
    ema.copy_to(parameters)


def autocast(device):
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    images = (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    rows = math.ceil(len(images) / columns)
    canvas = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    canvas[: len(images)] = images
    h, w = images.shape[1:3]
    return canvas.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)


def save_picture(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    write_atomically(path, lambda p: Image.fromarray(array).save(p, format="PNG"))


class Data:
    def __init__(self, work_dir: Path):
        folder = work_dir / "data"
        if not (folder / "captions.json").is_file():
            raise ToolError(f"no data in {folder}: run prepare_data.py --work-dir {work_dir} first")
        entries = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self.captions = [e["caption"] for e in entries]
        self.concepts = [i for i, e in enumerate(entries) if e["concept"]]
        self.images = {
            s: np.load(folder / f"images_{s}.npy", mmap_mode="r") for s in (64, 128, 256)
        }


# ---------------------------------------------------------------------------------------- VAE


def crop_batch(data: Data, count: int, size: int, generator) -> torch.Tensor:
    """Half of the crops from 256 px pictures, a quarter from 128 px, a quarter whole 64 px ones."""
    out = []
    picks = torch.randint(len(data.captions), (count,), generator=generator).tolist()
    for i, pick in enumerate(picks):
        source = (256, 256, 128, 64)[i % 4]
        room = max(0, source - size)
        # The sum of two draws: the middle, where the picture is, more often than the white border.
        top, left = (
            torch.rand(2, 2, generator=generator).mean(1).mul(room + 1).long().clamp_(max=room)
        ).tolist()
        out.append(data.images[source][pick, top : top + size, left : left + size])
    return to_tensor(np.stack(out))


def vae_loss(vae, features, data: Data, stage: Stage, device):
    def loss_fn(generator, step, part, parts):
        x = crop_batch(data, stage.batch // parts, stage.size, generator).to(device)
        x = x.to(memory_format=torch.channels_last)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            z = posterior.mean + posterior.std * noise
            y = vae.decode(z).sample
            perceptual = 0.0
            if stage.perceptual:
                with torch.no_grad():
                    targets = features.maps(x)
                perceptual = stage.perceptual * sum(
                    (a.float() - b.float()).square().sum(1).mean()
                    for a, b in zip(features.maps(y), targets)
                )
        kl = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        difference = y.float() - x
        colour = F.avg_pool2d(difference, 4).abs().mean()
        return difference.abs().mean() + 2 * colour + perceptual + 2.5e-4 * kl.mean()

    return loss_fn


@torch.no_grad()
def encode_all(vae, images: np.ndarray, indices, device, batch: int = 16) -> torch.Tensor:
    """The means of the latents."""
    out = []
    for start in tqdm(range(0, len(indices), batch), desc=f"latents {images.shape[1]} px"):
        x = to_tensor(images[indices[start : start + batch]]).to(device)
        with autocast(device):
            out.append(vae.encode(x.to(memory_format=torch.channels_last)).latent_dist.mean.float())
    return torch.cat(out).cpu()


@torch.no_grad()
def reconstruction_sheet(vae, data: Data, path: Path, device) -> float:
    """Originals above reconstructions at 128 and 256 px; returns the PSNR at 256 px."""
    vae.eval()
    picks = list(range(40, len(data.captions), len(data.captions) // 8))[:8]
    rows, psnr = [], 0.0
    for size in (128, 256):
        x = to_tensor(data.images[size][picks]).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        psnr = -10 * torch.log10((y.clamp(-1, 1) - x).square().mean() / 4).item()
        for images in (x, y):
            rows.append(to_uint8(F.interpolate(images, size=(192, 192), mode="bilinear")))
    save_picture(path, grid(np.concatenate(rows), 8))
    vae.train()
    return psnr


def train_vae(stage: Stage, previous: str | None, data: Data, work_dir: Path, args) -> None:
    from models import build_vae, initialise_colour_path, standardise_latents

    target = work_dir / "stages" / stage.name / "vae"
    if (target / "config.json").is_file():
        print(f"{stage.name}: finished already ({target})")
        return
    torch.manual_seed(args.seed)
    vae = build_vae()
    if previous is None:
        initialise_colour_path(vae)
    else:
        load_averaged(work_dir / "checkpoints" / f"{previous}.pt", vae)
    vae = vae.to(args.device, memory_format=torch.channels_last).train()
    features = common.build_features().to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(
        stage,
        {"vae": vae},
        vae_loss(vae, features, data, stage, args.device),
        work_dir,
        args.device,
        args.checkpoint_minutes,
        args.seed,
        args.workers,
    )
    trainer.resume()

    def on_checkpoint(trainer):
        path = work_dir / "sheets" / f"{stage.name}.png"
        psnr = reconstruction_sheet(vae, data, path, args.device)
        tqdm.write(
            f"{stage.name}: step {trainer.state.step}, reconstruction at 256 px {psnr:.1f} dB"
        )

    trainer.run(on_checkpoint, args.max_steps)
    if not trainer.finished:
        return
    trainer.ema.copy_to(trainer.parameters)
    vae.eval()
    z = encode_all(vae, data.images[128], data.concepts, args.device)
    standardise_latents(vae, z.mean((0, 2, 3)).to(args.device), z.std((0, 2, 3)).to(args.device))
    vae = vae.to(memory_format=torch.contiguous_format)
    for folder in (target, work_dir / "vae"):
        vae.save_pretrained(folder)


def decoder_loss(vae, features, data: Data, stage: Stage, device, jitter: float = 0.05):
    """As for the VAE, from latents as the UNet makes them: not quite those of a picture."""

    def loss_fn(generator, step, part, parts):
        x = crop_batch(data, stage.batch // parts, stage.size, generator).to(device)
        x = x.to(memory_format=torch.channels_last)
        with autocast(device):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean.float()
                amount = torch.rand(len(z), 1, 1, 1, generator=generator) * jitter
                noise = torch.randn(z.shape, generator=generator) * amount
                z = z + noise.to(device) / vae.config.scaling_factor
                targets = features.maps(x)
            y = vae.decode(z).sample
            perceptual = sum(
                (a.float() - b.float()).square().sum(1).mean()
                for a, b in zip(features.maps(y), targets)
            )
        difference = y.float() - x
        colour = F.avg_pool2d(difference, 4).abs().mean()
        return difference.abs().mean() + 2 * colour + stage.perceptual * perceptual

    return loss_fn


def train_decoder(stage: Stage, previous: str | None, data: Data, work_dir: Path, args) -> None:
    """Sharpen the decoder; the encoder, and so the cached latents, stay as they are."""
    from diffusers import AutoencoderKL
    from models import soften_upsampling

    target = work_dir / "stages" / stage.name / "vae"
    if (target / "config.json").is_file():
        print(f"{stage.name}: finished already ({target})")
        return
    source = work_dir / "stages" / (previous or "vae") / "vae"
    if not source.is_dir():
        raise ToolError(f"no VAE in {source}: run the stage before {stage.name} first")
    vae = AutoencoderKL.from_pretrained(source)
    soften_upsampling(vae)
    vae = vae.to(args.device, memory_format=torch.channels_last).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    features = common.build_features().to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(
        stage,
        {"vae": vae},
        decoder_loss(vae, features, data, stage, args.device),
        work_dir,
        args.device,
        args.checkpoint_minutes,
        args.seed,
        args.workers,
    )
    trainer.resume()

    def on_checkpoint(trainer):
        path = work_dir / "sheets" / f"{stage.name}.png"
        psnr = reconstruction_sheet(vae, data, path, args.device)
        tqdm.write(f"{stage.name}: step {trainer.state.step}, {psnr:.1f} dB at 256 px")

    trainer.run(on_checkpoint, args.max_steps)
    if trainer.finished:
        trainer.ema.copy_to(trainer.parameters)
        vae = vae.to(memory_format=torch.contiguous_format)
        for folder in (target, work_dir / "vae"):
            vae.save_pretrained(folder)


# ------------------------------------------------------------------- UNet and text encoder


def make_latents(data: Data, work_dir: Path, device) -> dict[int, torch.Tensor]:
    """Latents of the concepts at every picture size, as the diffusion model sees them; cached."""
    path = work_dir / "latents.pt"
    if not path.is_file():
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(work_dir / "vae").to(device).eval()
        latents = {
            size: (encode_all(vae, images, data.concepts, device) * vae.config.scaling_factor)
            for size, images in data.images.items()
        }
        write_atomically(path, lambda p: torch.save(latents, p))
    return torch.load(path, weights_only=True)


class Prompts:
    """Token ids of every caption in every wording, and of the empty prompt."""

    def __init__(self, captions, tokenizer):
        from tokenizer import TEMPLATES

        texts = [t.format(c) for c in captions for t in TEMPLATES] + [""]
        ids = tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        self.empty = ids[-1]
        self.ids = ids[:-1].view(len(captions), len(TEMPLATES), -1)

    def batch(self, picks: torch.Tensor, generator, drop: float = 0.1) -> torch.Tensor:
        """Seven in ten plain captions, two in ten worded otherwise, one in ten dropped."""
        n = len(picks)
        wording = torch.randint(1, self.ids.shape[1], (n,), generator=generator)
        u = torch.rand(n, generator=generator)
        wording[u < 0.78] = 0
        ids = self.ids[picks, wording].clone()
        ids[torch.rand(n, generator=generator) < drop] = self.empty
        return ids


def diffusion_loss(unet, text_encoder, latents, prompts, scheduler, stage: Stage, device, seed=0):
    """Prediction of v; weight 1 up to a signal-to-noise ratio of 4, then falling as min-SNR."""
    alphas = scheduler.alphas_cumprod
    weights = (5 * (1 - alphas)).clamp(max=1)  # 1 - alpha = 1 / (SNR + 1)
    steps = len(alphas)
    count = len(prompts.ids)

    def pick(step: int, start: int, n: int) -> torch.Tensor:
        """Pictures in an order shuffled anew for each pass."""
        out = []
        position = step * stage.batch + start
        while n:
            epoch, offset = divmod(position, count)
            order = torch.Generator().manual_seed(seed * 7919 + epoch)
            taken = torch.randperm(count, generator=order)[offset : offset + n]
            out.append(taken)
            n -= len(taken)
            position += len(taken)
        return torch.cat(out)

    def loss_fn(generator, step, part, parts):
        n = stage.batch // parts
        picks = pick(step, part * n, n)
        x = latents[stage.size][picks]
        # Times spread evenly over the batch: less noise in the loss.
        u = (torch.arange(n) * parts + part + torch.rand(n, generator=generator)) / stage.batch
        # ... and more of them where the picture is mostly noise and the caption decides.
        t = (u**stage.late * steps).long().clamp_(max=steps - 1)
        noise = torch.randn(x.shape, generator=generator)
        ids = prompts.batch(picks, generator)
        x, noise, ids = x.to(device), noise.to(device), ids.to(device)
        a = alphas[t].sqrt().view(-1, 1, 1, 1).to(device)
        s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1).to(device)
        noisy = (a * x + s * noise).to(memory_format=torch.channels_last)
        with autocast(device):
            context = text_encoder(ids)[0]
            v = unet(noisy, t.to(device), encoder_hidden_states=context).sample
        error = (v.float() - (a * noise - s * x)).square().mean((1, 2, 3))
        return (error * weights[t].to(device)).mean()

    return loss_fn


@torch.no_grad()
def sample(
    unet,
    text_encoder,
    vae,
    tokenizer,
    prompts,
    size,
    device,
    steps=20,
    guidance=3.0,
    seed=0,
    batch=16,
):
    """Pictures (uint8) for prompts: plain classifier-free guidance with DDIM."""
    from models import build_scheduler

    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    out = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        ids = tokenizer(
            [""] * len(texts) + list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        x = torch.stack(
            [
                torch.randn(
                    4,
                    size // 4,
                    size // 4,
                    generator=torch.Generator().manual_seed(seed + start + i),
                )
                for i in range(len(texts))
            ]
        ).to(device)
        with autocast(device):
            context = text_encoder(ids)[0]
            for t in scheduler.timesteps:
                v = unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.float()
                empty, text = v.chunk(2)
                x = scheduler.step(empty + guidance * (text - empty), t, x).prev_sample
            images = vae.decode(x / vae.config.scaling_factor).sample
        out.append(to_uint8(images))
    return np.concatenate(out)


SHEET = (
    'rocket', 'panda', 'red apple', 'pizza', 'face with tears of joy', 'butterfly', 'guitar',
    'christmas tree', 'police car', 'octopus', 'sunflower', 'house', 'crown', 'penguin',
    'birthday cake', 'robot',
)  # fmt: skip


def train_unet(stage: Stage, previous: str | None, data: Data, work_dir: Path, args) -> None:
    from diffusers import AutoencoderKL
    from models import build_scheduler, build_text_encoder, build_unet
    from tokenizer import train_tokenizer
    from transformers import CLIPTokenizer

    from mmagic_tome import apply_tome, remove_tome

    target = work_dir / "stages" / stage.name
    if (target / "unet" / "config.json").is_file():
        print(f"{stage.name}: finished already ({target})")
        return
    if not (work_dir / "vae" / "config.json").is_file():
        raise ToolError(f'no VAE in {work_dir}: run the stage "vae" first')
    captions = [data.captions[i] for i in data.concepts]
    folder = work_dir / "tokenizer"
    if not (folder / "vocab.json").is_file():
        train_tokenizer(data.captions, folder)  # also those that the UNet never sees
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    latents = make_latents(data, work_dir, args.device)
    torch.manual_seed(args.seed)
    unet = build_unet(sample_size=stage.size // 4)
    text_encoder = build_text_encoder(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    if previous is not None:
        load_averaged(work_dir / "checkpoints" / f"{previous}.pt", unet, text_encoder)
    unet = unet.to(args.device, memory_format=torch.channels_last).train()
    text_encoder = text_encoder.to(args.device).train()
    vae = AutoencoderKL.from_pretrained(work_dir / "vae").to(args.device).eval()
    trainer = Trainer(
        stage,
        {'unet': unet, 'text_encoder': text_encoder},
        diffusion_loss(
            unet, text_encoder, latents, Prompts(captions, tokenizer), build_scheduler(), stage,
            args.device, args.seed,
        ),
        work_dir,
        args.device,
        args.checkpoint_minutes,
        args.seed,
        args.workers,
    )  # fmt: skip
    if previous is not None:
        # Adam's averages of the gradients too: starting them anew costs hundreds of steps.
        before = work_dir / "checkpoints" / f"{previous}.pt"
        state = torch.load(before, map_location="cpu", weights_only=True)["optimizer"]
        trainer.optimizer.load_state_dict(state)
    if trainer.resume():
        print(f"{stage.name}: going on from step {trainer.state.step}")
    if stage.merge:
        apply_tome(unet, ratio=stage.merge)

    def on_checkpoint(trainer):
        pictures = sample(
            unet, text_encoder, vae, tokenizer, SHEET, stage.size, args.device, steps=10
        )
        sheets = work_dir / "sheets"
        save_picture(sheets / f"{stage.name}_{trainer.state.step:06d}.png", grid(pictures, 8))
        plot_losses(work_dir)

    trainer.run(on_checkpoint, args.max_steps)
    if trainer.finished:
        remove_tome(unet)
        with trainer.averaged():
            unet.to(memory_format=torch.contiguous_format)
            text_encoder.save_pretrained(target / "text_encoder")
            unet.save_pretrained(target / "unet")


def plot_losses(work_dir: Path) -> None:
    """All stages that have a log, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    for path in sorted((work_dir / "logs").glob("*.json"), key=lambda p: p.stat().st_mtime):
        log = json.loads(path.read_text(encoding="utf-8"))
        if log["losses"]:
            steps, _, losses = zip(*log["losses"])
            ax = axes[1 if path.stem.startswith("unet") else 0]
            ax.plot(steps, losses, label=f"{path.stem} ({log['seconds'] / 60:.0f} min)")
    for ax in axes:
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        ax.set_yscale("log")
        ax.grid(alpha=0.3, which="both")
        if ax.lines:
            ax.legend()
    figure.tight_layout()
    write_atomically(work_dir / "loss_curve.png", lambda p: figure.savefig(p, dpi=90, format="png"))
    plt.close(figure)


def main() -> None:
    args = parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ToolError(f"--device {args.device}: there is no usable GPU here")
    if args.workers > 1:
        torch.set_num_threads(1)  # one process per core instead of one thread per core
    elif args.threads:
        torch.set_num_threads(args.threads)
    check_stages(args)
    common.repair_torchvision()
    data = Data(args.work_dir)
    previous = {"vae": None, "unet": None}
    for stage in RECIPES[args.recipe]:
        kind = stage.name.split("_")[0]
        if args.only is None or stage.name in args.only:
            run = {"vae": train_vae, "decoder": train_decoder, "unet": train_unet}[kind]
            before = previous["unet" if kind == "unet" else "vae"]
            run(with_options(stage, args), before, data, args.work_dir, args)
        previous["unet" if kind == "unet" else "vae"] = stage.name


def check_stages(args) -> None:
    names = [s.name for s in RECIPES[args.recipe]]
    for option in [*(args.only or []), *(m.split("=")[0] for m in args.minutes or [])]:
        if option not in names:
            raise ToolError(f"no stage {option} in this recipe: it has {', '.join(names)}")


def with_options(stage: Stage, args) -> Stage:
    minutes = dict(m.split("=") for m in args.minutes or [])
    return replace(stage, minutes=float(minutes.get(stage.name, stage.minutes)))


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="cpu")
    parser.add_argument("--work-dir", default=DEFAULT_WORK_DIR, type=Path)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages only")
    parser.add_argument(
        "--minutes", nargs="+", metavar="STAGE=MINUTES", help="other lengths than the recipe has"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes of one thread each (CPU only)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument(
        "--max-steps", type=int, help="stop each stage after this many steps (resumable)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
