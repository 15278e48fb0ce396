#!/usr/bin/env python
"""Put the diffusion transformer together as a Stable Diffusion 3 model in diffusers layout, fp16.

Takes the averaged weights of the last checkpoint of a stage, which may still run. The result loads
with diffusers' StableDiffusion3Pipeline.from_pretrained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
from common import DEFAULT_WORK_DIR, DIT_ASSETS, ToolError, run_tool
from export import export

INDEX = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", default=DEFAULT_WORK_DIR, type=Path)
    parser.add_argument("--stage", required=True, help="a stage of train.py, such as dit_mixed")
    parser.add_argument("--out", type=Path, default=DIT_ASSETS)
    parser.add_argument(
        "--sample-size", type=int, help="latents per side at the default image size"
    )
    args = parser.parse_args()
    common.repair_torchvision()
    from diffusers import AutoencoderKL
    from models_dit import (
        PROMPT_TOKENS,
        build_flow_scheduler,
        build_text_encoders,
        build_transformer,
        for_flow,
    )
    from trainer import load_averaged
    from transformers import CLIPTokenizer

    path = args.work_dir / "checkpoints" / f"{args.stage}.pt"
    if not path.is_file():
        raise ToolError(f"no checkpoint {path}")
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    transformer = build_transformer()
    encoders = build_text_encoders(len(tokenizer), tokenizer.eos_token_id)
    load_averaged(path, transformer, *encoders)
    if args.sample_size:
        transformer.register_to_config(sample_size=args.sample_size)
    modules = {
        "vae": for_flow(AutoencoderKL.from_pretrained(args.work_dir / "vae")),
        "transformer": transformer,
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "scheduler": build_flow_scheduler(),
    }
    written = export(
        modules,
        args.work_dir / "tokenizer",
        args.out,
        "StableDiffusion3Pipeline",
        INDEX,
        PROMPT_TOKENS,
    )
    print(f"{written:,} bytes of weights in {args.out}")


if __name__ == "__main__":
    run_tool(main)
