"""The stages that train the VAE and its decoder."""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import ToolError
from images import Data, autocast, grid, save_image, to_tensor, to_uint8
from stages import Stage
from tqdm import tqdm
from trainer import Trainer, load_averaged


def crop_batch(data: Data, count: int, size: int, generator) -> torch.Tensor:
    """Half of the crops from 256 px images, a quarter from 128 px, a quarter whole 64 px ones."""
    out = []
    picks = torch.randint(len(data.captions), (count,), generator=generator).tolist()
    for i, pick in enumerate(picks):
        source = (256, 256, 128, 64)[i % 4]
        room = max(0, source - size)
        # The sum of two draws: the middle, where the image is, more often than the white border.
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
    save_image(path, grid(np.concatenate(rows), 8))
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
    """As for the VAE, from latents as the UNet makes them: not quite those of an image."""

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
