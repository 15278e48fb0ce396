# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How well outputs of a network can be extrapolated from the steps before.

Runs the baseline demo model, keeps the outputs of the whole network, of its inner levels and of
every transformer block (what the block adds to its tokens), and compares each with the
extrapolation of order 0, 1 or 2 from the last steps. Relative error, root mean square over all
prompts.

python benchmarks/smoothness.py --steps 20 --plot docs/research/smoothness.png
"""

import argparse
import warnings

import torch

from mmagic_tome.apis import asset_path
from mmagic_tome.apis.files import whole_file
from mmagic_tome.cache.extrapolate import extrapolate
from mmagic_tome.models import find_adapter

PROMPTS = ("rocket", "panda", "red apple", "pizza", "guitar", "octopus", "crown", "robot")
ORDERS = (0, 1, 2)


@torch.no_grad()
def record(steps: int, prompts: tuple[str, ...]) -> dict[str, list[tuple[float, torch.Tensor]]]:
    """What -> [(timestep, output)] of a dense run."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        asset_path("demo_model"), safety_checker=None, torch_dtype=torch.float32
    )
    adapter, network = find_adapter(pipeline)
    seen: dict[str, list] = {"network": [], "inner levels": []}
    now = [0.0]

    def start(module, args, kwargs):
        now[0] = float(adapter.timestep(args, kwargs))

    def keep(name, adds=False):
        def hook(module, args, kwargs, output):
            y = output if isinstance(output, torch.Tensor) else output[0]
            if adds:
                y = y - (args[0] if args else kwargs["hidden_states"])
            seen.setdefault(name, []).append((now[0], y.clone()))

        return hook

    network.register_forward_pre_hook(start, with_kwargs=True)
    network.register_forward_hook(keep("network"), with_kwargs=True)
    adapter.inner_modules(network, 1)[-1].register_forward_hook(
        keep("inner levels"), with_kwargs=True
    )
    for block in adapter.blocks(network):
        name = f"block, level {block.downsample}: {block.name}"
        block.module.register_forward_hook(keep(name, adds=True), with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pipeline(
        list(prompts), num_inference_steps=steps, guidance_scale=3.0, generator=generators,
        height=128, width=128, output_type="latent",
    )  # fmt: skip
    return seen


def errors(outputs: list[tuple[float, torch.Tensor]], order: int) -> list[tuple[float, float]]:
    """(timestep, relative error) of the extrapolation at every step, from those before it."""
    found = []
    for step in range(order + 1, len(outputs)):
        time, y = outputs[step]
        times, values = zip(*outputs[step - 1 - order : step])
        error = (extrapolate(times, values, time) - y).norm() / y.norm()
        found.append((time, error.item()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--prompts", type=int, default=4, help="of 8 prompts so many (default: 4)")
    parser.add_argument("--plot", metavar="FILE", help="draw it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    seen = record(args.steps, PROMPTS[: args.prompts])
    # Of the blocks of a level their mean.
    groups: dict[str, list[list]] = {}
    for name, outputs in seen.items():
        groups.setdefault(name.split(":")[0], []).append([errors(outputs, o) for o in ORDERS])
    print(f"torch {torch.__version__}, {args.steps} steps, {args.prompts} prompts")
    print(f"{'':18}" + "".join(f"order {o:<19}" for o in ORDERS))
    print(f"{'':18}" + "t > 700  others  last   " * len(ORDERS))
    for name, members in groups.items():
        cells = ""
        for order in ORDERS:
            points = [point for member in members for point in member[order]]
            last = min(time for time, _ in points)
            for chosen in (
                [e for t, e in points if t > 700],
                [e for t, e in points if last < t <= 700],
                [e for t, e in points if t == last],
            ):
                cells += f"{sum(chosen) / len(chosen):7.3f} " if chosen else f"{'-':>7} "
            cells += " "
        print(f"{name:18}{cells}")
    if args.plot:
        draw(groups, args.plot)


def draw(groups: dict[str, list[list]], file: str) -> None:
    """A panel per group, a line per order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(groups), figsize=(3 * len(groups), 3), sharey=True, layout="constrained"
    )
    for panel, (name, members) in zip(panels, groups.items()):
        for order in ORDERS:
            times = [time for time, _ in members[0][order]]
            values = [
                sum(member[order][i][1] for member in members) / len(members)
                for i in range(len(times))
            ]
            panel.plot(times, values, label=f"order {order}", marker=".")
        panel.set(title=name, xlabel="timestep", yscale="log")
        panel.invert_xaxis()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of the extrapolation")
    panels[0].legend()
    with whole_file(file) as part:
        figure.savefig(part, dpi=110)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
