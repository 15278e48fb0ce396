#!/usr/bin/env python
"""Train the demo model: VAE, cached latents, UNet and text encoder together, then the decoder.

Run prepare_data.py first. Every stage writes a checkpoint every few minutes; the same command run
again goes on from the last one. Loss curves and sample sheets lie in WORK_DIR.

Recipes
  cpu   two cores, about two hours: most steps on 64 and 128 px images, in resumable pieces
  cpu_256  the same and about six hours more on 256 px images (4096 tokens)
  mixed  one core for hours, from --start-from on: 128 and 256 px mixed, more concepts
  last  from --start-from on, an average of weights (average.py): 128 px more often than 256 px
  dit   one core for hours: the diffusion transformer; its VAE and the start of its text encoder
        come from --start-from (default: the shipped model)
  gpu   one large GPU, under 25 minutes: bf16, finishing on 256 px images
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import torch
from common import ASSETS, DEFAULT_WORK_DIR, ToolError, run_tool
from images import Data
from stages import RECIPES, Stage
from train_dit import train_dit
from train_unet import train_unet
from train_vae import train_decoder, train_vae


def main() -> None:
    args = parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ToolError(f"--device {args.device}: there is no usable GPU here")
    if args.workers > 1:
        torch.set_num_threads(1)  # one process per core instead of one thread per core
    elif args.threads:
        torch.set_num_threads(args.threads)
    check_stages(args)
    if args.recipe == "mixed" and args.start_from is None:
        args.start_from = ASSETS
    if args.recipe == "last" and args.start_from is None:
        raise ToolError("the recipe last needs --start-from MODEL, which average.py writes")
    common.repair_torchvision()
    data = Data(args.work_dir)
    previous: dict[str, str] = {}
    for stage in RECIPES[args.recipe]:
        kind = stage.name.split("_")[0]
        if args.only is None or stage.name in args.only:
            run = {
                "vae": train_vae,
                "decoder": train_decoder,
                "unet": train_unet,
                "dit": train_dit,
            }[kind]
            before = previous.get("vae" if kind == "decoder" else kind)
            run(with_options(stage, args), before, data, args.work_dir, args)
        previous["vae" if kind == "decoder" else kind] = stage.name


def check_stages(args) -> None:
    names = [s.name for s in RECIPES[args.recipe]]
    for option in [*(args.only or []), *(m.split("=")[0] for m in args.minutes or [])]:
        if option not in names:
            raise ToolError(f"no stage {option} in this recipe: it has {', '.join(names)}")


def with_options(stage: Stage, args) -> Stage:
    minutes = dict(m.split("=") for m in args.minutes or [])
    changes = {"minutes": float(minutes.get(stage.name, stage.minutes))}
    if stage.name.startswith("unet"):
        if args.sizes:
            # The weights of the recipe belong to the sizes of the recipe.
            changes.update(sizes=args.sizes, size=max(args.sizes), size_weights=())
        if args.size_weights:
            changes["size_weights"] = args.size_weights
    return replace(stage, **changes)


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
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        choices=(64, 128, 256),
        metavar="PIXELS",
        help="UNet stages draw one of these image sizes for every step (default: as the recipe)",
    )
    parser.add_argument(
        "--size-weights",
        nargs="+",
        type=float,
        metavar="WEIGHT",
        help="how often each size is drawn, relative to each other (default: equally often)",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="MODEL",
        help="a model in diffusers layout whose weights the first UNet stage starts from; "
        "the recipe mixed starts from the shipped one",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes of one thread each (CPU only)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument(
        "--sheet-minutes",
        type=float,
        default=0.0,
        help="at least this long between sample sheets (UNet stages)",
    )
    parser.add_argument(
        "--max-steps", type=int, help="stop each stage after this many steps (resumable)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
