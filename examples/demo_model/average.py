#!/usr/bin/env python
"""Average the weights of two models of one shape, in diffusers layout.

What lies between the weights before and after a training often does both old and new well
(Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

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
    shutil.copytree(args.after, args.out)
    for part in PARTS:
        old, new = load_file(args.before / part), load_file(args.after / part)
        mean = {
            name: (args.share * new[name].float() + (1 - args.share) * old[name].float()).half()
            for name in new
        }
        save_file(mean, args.out / part, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
