"""The stages that train the diffusion transformer and its text encoders, on cached latents."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from common import ASSETS, ToolError
from images import Data, autocast, grid, plot_losses, save_image
from stages import Stage
from train_unet import SHEET, Prompts, adopt, make_latents
from trainer import Trainer, load_averaged

# A pipeline without its third text encoder appends this many tokens of zeros to the text; they are
# all alike. Training has one of them and a number, drawn for every step, that it stands for.
NO_TEXT_TOKENS = (1, 20, 77, 256)
MOST_SHIFT = 3.0  # of the training times at 256 px and above


def build(work_dir: Path, args):
    """(tokenizer, transformer, both text encoders) before their first step."""
    from models_dit import PROMPT_TOKENS, build_text_encoders, build_transformer
    from transformers import CLIPTextModel, CLIPTokenizer

    adopt(args.start_from or ASSETS, work_dir)
    tokenizer = CLIPTokenizer.from_pretrained(
        work_dir / "tokenizer", model_max_length=PROMPT_TOKENS
    )
    torch.manual_seed(args.seed)
    transformer = build_transformer()
    first, second = build_text_encoders(len(tokenizer), tokenizer.eos_token_id)
    trained = CLIPTextModel.from_pretrained(
        (args.start_from or ASSETS) / "text_encoder", torch_dtype=torch.float32
    )
    missing, unexpected = first.load_state_dict(
        {f"text_model.{k.removeprefix('text_model.')}": v for k, v in trained.state_dict().items()},
        strict=False,
    )
    if unexpected or missing != ["text_projection.weight"]:
        raise ToolError(f"text encoder of another build: missing {missing}, left {unexpected}")
    return tokenizer, transformer, first, second


def flow_times(u: torch.Tensor, shift: float, spread: float = 1.2) -> torch.Tensor:
    """Uniform numbers -> logit-normal times in (0, 1), shifted towards noise, which is at 1."""
    t = torch.sigmoid(spread * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    return shift * t / (1 + (shift - 1) * t)


def time_shift(size: int) -> float:
    """Larger images stay recognisable under more noise: 1 at 64 px, 2 at 128 px, 3 at 256 px.

    Esser et al., section 5.3.2, has the square root of the number of tokens; large areas of emoji
    are plain, so the last one is less.
    """
    return min(MOST_SHIFT, max(1.0, size / 64))


def flow_loss(transformer, encoders, latents, prompts: Prompts, stage: Stage, device, seed=0):
    """Rectified flow: x_t = (1 - t) x + t noise, of which the velocity noise - x is predicted."""
    from models_dit import TrainingAttention, encode_text

    transformer.set_attn_processor(TrainingAttention())
    compiled = torch.compile(transformer) if stage.compile else transformer
    count = len(prompts.ids)

    def loss_fn(generator, step, part, parts):
        size, _ = stage.draw(step, seed)
        n = math.ceil(stage.batch_at(size) / parts)
        picks = torch.randperm(count, generator=generator)[:n]
        n = len(picks)  # there may be fewer captions
        x = latents[size][picks]
        # Times spread evenly over the batch: less noise in the loss.
        u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        t = flow_times(u[torch.randperm(n, generator=generator)], time_shift(size))
        noise = torch.randn(x.shape, generator=generator)
        ids = prompts.batch(picks, generator)
        stands_for = NO_TEXT_TOKENS[
            int(torch.randint(len(NO_TEXT_TOKENS), (1,), generator=generator))
        ]
        x, noise, ids, t = (v.to(device) for v in (x, noise, ids, t))
        mix = t.view(-1, 1, 1, 1)
        noisy = (1 - mix) * x + mix * noise
        tokens = (x.shape[-1] // transformer.config.patch_size) ** 2 + ids.shape[1] + 1
        bias = torch.zeros(1, 1, 1, tokens, device=device)
        bias[..., -1] = math.log(stands_for)
        with autocast(device):
            text, pooled = encode_text(*encoders, ids)
            text = torch.nn.functional.pad(text, (0, 0, 0, 1))
            v = compiled(
                noisy,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=1000 * t,
                joint_attention_kwargs={"key_bias": bias},
                return_dict=False,
            )[0]
        return (v.float() - (noise - x)).square().mean()

    return loss_fn


@torch.no_grad()
def sample(
    pipeline, prompts, size: int, steps=16, guidance=3.0, seed=0, batch=8, no_text_tokens=20
) -> np.ndarray:
    """Pictures (uint8) for prompts, by the ordinary pipeline."""
    out = []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        with autocast(pipeline.device):
            pictures = pipeline(
                texts,
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[
                    torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))
                ],
                max_sequence_length=no_text_tokens,
                output_type="np",
            ).images
        out.append((pictures * 255).round().astype(np.uint8))
    return np.concatenate(out)


def build_pipeline(transformer, first, second, vae, tokenizer):
    from diffusers import StableDiffusion3Pipeline
    from models_dit import build_flow_scheduler, for_flow

    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_flow_scheduler(),
        vae=for_flow(vae),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def train_dit(stage: Stage, previous: str | None, data: Data, work_dir: Path, args) -> None:
    from diffusers import AutoencoderKL

    checkpoint = work_dir / "checkpoints" / f"{stage.name}.pt"
    tokenizer, transformer, first, second = build(work_dir, args)
    latents = make_latents(data, work_dir, args.device)
    modules = {"transformer": transformer, "text_encoder": first, "text_encoder_2": second}
    if previous is not None and not checkpoint.is_file():
        load_averaged(work_dir / "checkpoints" / f"{previous}.pt", *modules.values())
    for module in modules.values():
        module.to(args.device).train()
    vae = AutoencoderKL.from_pretrained(work_dir / "vae").to(args.device).eval()
    captions = [data.captions[i] for i in data.concepts]
    trainer = Trainer(
        stage,
        modules,
        flow_loss(
            transformer, (first, second), latents, Prompts(captions, tokenizer), stage,
            args.device, args.seed,
        ),
        work_dir,
        args.device,
        args.checkpoint_minutes,
        args.seed,
        args.workers,
    )  # fmt: skip
    if trainer.resume():
        print(f"{stage.name}: going on from step {trainer.state.step}")
    elif previous is not None:
        before = work_dir / "checkpoints" / f"{previous}.pt"
        state = torch.load(before, map_location="cpu", weights_only=True)["optimizer"]
        trainer.optimizer.load_state_dict(state)
    if trainer.finished:
        print(f"{stage.name}: finished already ({checkpoint})")
        return
    pipeline = build_pipeline(transformer, first, second, vae, tokenizer)

    def on_checkpoint(trainer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images = sample(pipeline, SHEET, stage.size)
        sheets = work_dir / "sheets"
        save_image(sheets / f"{stage.name}_{trainer.state.step:06d}.png", grid(images, 8))
        plot_losses(work_dir)

    trainer.run(on_checkpoint, args.max_steps, args.sheet_minutes)
