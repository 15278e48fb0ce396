# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How well the next input of a denoising run follows from the run, and that of another image.

The residual of ``mmagic_tome.runs.Run.fit`` decides whether a call continues a run. For every
scheduler and guidance scale this denoises images with the demo model and fits

- ``own``: the inputs of a run's own next steps,
- ``other``: the inputs of other images at the same step,
- ``later``: the inputs of other images four steps later, as after a run that was stopped.

    python benchmarks/run_continuity.py --out benchmarks/run_continuity_demo_cpu.json

One CPU core takes about six minutes. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

import mmagic_tome  # noqa: F401  (repairs imports of diffusers where they are broken)
from mmagic_tome.apis import asset_path
from mmagic_tome.runs import Branch, Run

SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "SDE-DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DDPM": ("DDPMScheduler", {}),
}
PROMPTS = ["red apple", "sailboat", "cat face", "green apple"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps per image (default 20)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 7.5], metavar="SCALE")
    parser.add_argument("--out", type=Path, help="JSON file for all residuals (default: none)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load()
    rows = []
    for name, (class_name, options) in SCHEDULERS.items():
        for guidance in args.guidance:
            residuals = measure(pipeline, class_name, options, guidance, args.steps)
            rows.append({"scheduler": name, "guidance": guidance, **residuals})
            if not len(rows) % len(args.guidance):
                print(f"{len(rows) // len(args.guidance)}/{len(SCHEDULERS)} {name}", flush=True)
    print(table(rows))
    if args.out is not None:
        import diffusers

        record = {
            "steps": args.steps,
            "prompts": PROMPTS,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "rows": [
                {
                    key: _short(value) if isinstance(value, list) else value
                    for key, value in row.items()
                }
                for row in rows
            ],
        }
        args.out.write_text(json.dumps(record) + "\n")


def _short(residuals: list[float]) -> list[float]:
    return [float(f"{residual:.3g}") for residual in residuals]


def load():
    """The demo model's pipeline, in single precision."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        asset_path("demo_model"), safety_checker=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trajectory(pipeline, class_name: str, options: dict, guidance: float, steps: int, number: int):
    """[(input, output)] of the network for one image."""
    import diffusers

    scheduler = getattr(diffusers, class_name)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    calls = []
    hook = pipeline.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args[0].clone(), output[0].clone())),
        with_kwargs=True,
    )
    pipeline(
        PROMPTS[number],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(number),
        output_type="latent",
    )
    hook.remove()
    return calls


def measure(pipeline, class_name: str, options: dict, guidance: float, steps: int) -> dict:
    """{'own' | 'other' | 'later': residuals} over all images and steps."""
    images = [
        trajectory(pipeline, class_name, options, guidance, steps, number)
        for number in range(len(PROMPTS))
    ]
    found: dict[str, list[float]] = {"own": [], "other": [], "later": []}
    for number, calls in enumerate(images):
        run = Run(None)
        run.called, run.branches = [0], {0: Branch(None)}
        for step, (x, output) in enumerate(calls):
            if step:
                found["own"].append(run.fit([x])[0])
                for other in images[:number] + images[number + 1 :]:
                    found["other"].append(run.fit([other[step][0]])[0])
                    if step + 4 < len(other):
                        found["later"].append(run.fit([other[step + 4][0]])[0])
                run.previous, run.input = run.input, None
            run.remember([x], output)
    return found


def table(rows: list[dict]) -> str:
    """Smallest, median and largest residual of every row, in Markdown."""
    lines = [
        "| scheduler | guidance | own next step | another image, same step | four steps later |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{min(row[key]):.1g} / {statistics.median(row[key]):.2g} / {max(row[key]):.2g}"
            for key in ("own", "other", "later")
        ]
        lines.append(f"| {row['scheduler']} | {row['guidance']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
