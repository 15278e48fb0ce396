#!/usr/bin/env python
"""Average the weights of two models of one shape, in diffusers layout.

What lies between the weights before and after a training often does both old and new well
(Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ToolError, run_tool

PARTS = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


def main() -> None:
    from safetensors.torch import load_file, save_file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a model's folder")
    parser.add_argument("after", type=Path, help="another; all but the weights is copied from it")
    parser.add_argument("--share", type=float, default=0.75, help="of `after`; default: 0.75")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    needed = [folder / part for folder in (args.before, args.after) for part in PARTS]
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise ToolError(f"there is no {missing[0]}; give two models in diffusers layout")
    if args.out.exists():
        raise ToolError(f"--out {args.out} is there already; name another folder")
    shutil.copytree(args.after, args.out)
    for part in PARTS:
        old, new = load_file(args.before / part), load_file(args.after / part)
        mean = {
            name: (args.share * new[name].float() + (1 - args.share) * old[name].float()).half()
            for name in new
        }
        save_file(mean, args.out / part, metadata={"format": "pt"})


if __name__ == "__main__":
    run_tool(main)
