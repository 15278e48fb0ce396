#!/usr/bin/env python
"""Put a trained stage together as a Stable Diffusion model in diffusers layout, fp16 safetensors.

The result loads with diffusers' StableDiffusionPipeline.from_pretrained and, piece by piece, with
`from_pretrained` in a MMagic config.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import torch
from common import ASSETS, DEFAULT_WORK_DIR, ToolError, run_tool, save_json

LIMIT = 24_000_000  # bytes of weights that a model of the package may have
CLASSES = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
INDEX = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    **CLASSES,
}


def export(
    modules: dict,
    tokenizer_folder: Path,
    out: Path,
    pipeline: str = "StableDiffusionPipeline",
    index: dict = INDEX,
    prompt_tokens: int | None = None,
) -> int:
    """Write the parts in diffusers layout; returns the bytes of weights.

    The tokenizer is written for every entry of `index` whose name starts with "tokenizer" and that
    is not None; `prompt_tokens` is its length of a prompt (default: as it has it).
    """
    import diffusers

    size = sum(
        2 * p.numel() for m in modules.values() if hasattr(m, "parameters") for p in m.parameters()
    )
    if size > LIMIT:
        raise ToolError(f"the weights would take {size:,} bytes; at most {LIMIT:,} are allowed")
    out.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        if isinstance(module, torch.nn.Module):
            module = module.half()
            for p in module.parameters():
                p.data = p.data.contiguous()
        module.save_pretrained(out / name)
        config = out / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)  # where this machine had it
        save_json(config, values)
    for name, kind in index.items():
        if name.startswith("tokenizer") and kind != [None, None]:
            copy_tokenizer(tokenizer_folder, out / name, prompt_tokens)
    save_json(
        out / "model_index.json",
        {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **index},
    )
    weights = list(out.rglob("*.safetensors"))
    for path in weights:
        path.chmod(0o644)  # safetensors writes them for the owner only
    return sum(p.stat().st_size for p in weights)


def copy_tokenizer(folder: Path, out: Path, prompt_tokens: int | None = None) -> None:
    out.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir()):
        shutil.copyfile(path, out / path.name)
    if prompt_tokens is not None:
        config = out / "tokenizer_config.json"
        values = json.loads(config.read_text(encoding="utf-8"))
        save_json(config, {**values, "model_max_length": prompt_tokens})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", default=DEFAULT_WORK_DIR, type=Path)
    parser.add_argument("--stage", required=True, help="a stage of train.py, such as unet_128")
    parser.add_argument(
        "--checkpoint", action="store_true", help="its last checkpoint: the stage still runs"
    )
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument(
        "--sample-size", type=int, help="latents per side at the default picture size"
    )
    args = parser.parse_args()
    common.repair_torchvision()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from models import build_scheduler, build_text_encoder, build_unet
    from transformers import CLIPTextModel, CLIPTokenizer

    stage = args.work_dir / "stages" / args.stage
    if args.checkpoint:
        path = args.work_dir / "checkpoints" / f"{args.stage}.pt"
        if not path.is_file():
            raise ToolError(f"no checkpoint {path}")
        tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        unet = build_unet(sample_size=checkpoint["stage"]["size"] // 4)
        text_encoder = build_text_encoder(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        parameters = [*unet.parameters(), *text_encoder.parameters()]
        ema = EMAModel(parameters)
        ema.load_state_dict(checkpoint["ema"])
        ema.copy_to(parameters)
    elif (stage / "unet" / "config.json").is_file():
        unet = UNet2DConditionModel.from_pretrained(stage / "unet")
        text_encoder = CLIPTextModel.from_pretrained(stage / "text_encoder")
    else:
        raise ToolError(f"{stage} is not there: is the stage finished? (else: --checkpoint)")
    if args.sample_size:
        unet.register_to_config(sample_size=args.sample_size)
    modules = {
        "vae": AutoencoderKL.from_pretrained(args.work_dir / "vae"),
        "unet": unet,
        "text_encoder": text_encoder,
        "scheduler": build_scheduler(),
    }
    written = export(modules, args.work_dir / "tokenizer", args.out)
    print(f"{written:,} bytes of weights in {args.out}")


if __name__ == "__main__":
    run_tool(main)
