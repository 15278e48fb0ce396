"""The stages that train UNet and text encoder together, on cached latents."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from common import ToolError, write_atomically
from images import Data, autocast, grid, plot_losses, save_image, to_uint8
from stages import Stage
from train_vae import encode_all
from trainer import Trainer, load_averaged


def make_latents(data: Data, work_dir: Path, device) -> dict[int, torch.Tensor]:
    """Latents of the concepts at every image size, as the diffusion model sees them; cached."""
    path = work_dir / "latents.pt"
    captions = [data.captions[i] for i in data.concepts]
    if path.is_file():
        cached = torch.load(path, weights_only=True)
        if cached.pop("captions", captions) == captions and len(cached[64]) == len(captions):
            return cached
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work_dir / "vae").to(device).eval()
    latents = {
        size: (encode_all(vae, images, data.concepts, device) * vae.config.scaling_factor)
        for size, images in data.images.items()
    }
    write_atomically(path, lambda p: torch.save({**latents, "captions": captions}, p))
    return latents


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


def set_merging(unet, ratio: float) -> None:
    """Merge tokens in the UNet from now on at this ratio; 0: compute all tokens."""
    from mmagic_tome import apply_tome, remove_tome

    if getattr(unet, "_merge_ratio", 0.0) != ratio:
        remove_tome(unet)
        if ratio:
            apply_tome(unet, ratio=ratio, targets="attn")
        unet._merge_ratio = ratio


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
        size, ratio = stage.draw(step, seed)
        set_merging(unet, ratio)
        x = latents[size][picks]
        # Times spread evenly over the batch: less noise in the loss.
        u = (torch.arange(n) * parts + part + torch.rand(n, generator=generator)) / stage.batch
        # ... and more of them where the image is mostly noise and the caption decides.
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


def adopt(model: Path, work_dir: Path) -> None:
    """Copy VAE and tokenizer from a model in diffusers layout, unless WORK_DIR has its own."""
    if not (model / "model_index.json").is_file():
        raise ToolError(f"--start-from {model}: no model_index.json there")
    for name in ("vae", "tokenizer"):
        if not (work_dir / name).is_dir():
            shutil.copytree(model / name, work_dir / name)


def train_unet(stage: Stage, previous: str | None, data: Data, work_dir: Path, args) -> None:
    from diffusers import AutoencoderKL
    from models import build_scheduler, build_text_encoder, build_unet
    from tokenizer import train_tokenizer
    from transformers import CLIPTokenizer

    target = work_dir / "stages" / stage.name
    if (target / "unet" / "config.json").is_file():
        print(f"{stage.name}: finished already ({target})")
        return
    if previous is None and args.start_from is not None:
        adopt(args.start_from, work_dir)
    captions = [data.captions[i] for i in data.concepts]
    folder = work_dir / "tokenizer"
    if not (folder / "vocab.json").is_file():
        train_tokenizer(data.captions, folder)  # also those that the UNet never sees
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if not (work_dir / "vae" / "config.json").is_file():
        raise ToolError(f'no VAE in {work_dir}: run the stage "vae" first')
    latents = make_latents(data, work_dir, args.device)
    torch.manual_seed(args.seed)
    unet = build_unet(sample_size=stage.size // 4)
    text_encoder = build_text_encoder(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    if previous is not None:
        load_averaged(work_dir / "checkpoints" / f"{previous}.pt", unet, text_encoder)
    elif args.start_from is not None:
        for name, module in (("unet", unet), ("text_encoder", text_encoder)):
            trained = type(module).from_pretrained(
                args.start_from / name, torch_dtype=torch.float32
            )
            module.load_state_dict(trained.state_dict())
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

    def on_checkpoint(trainer):
        set_merging(unet, 0.0)
        images = sample(
            unet, text_encoder, vae, tokenizer, SHEET, stage.size, args.device, steps=10
        )
        sheets = work_dir / "sheets"
        save_image(sheets / f"{stage.name}_{trainer.state.step:06d}.png", grid(images, 8))
        plot_losses(work_dir)

    trainer.run(on_checkpoint, args.max_steps, args.sheet_minutes)
    if trainer.finished:
        set_merging(unet, 0.0)
        with trainer.averaged():
            unet.to(memory_format=torch.contiguous_format)
            text_encoder.save_pretrained(target / "text_encoder")
            unet.save_pretrained(target / "unet")
