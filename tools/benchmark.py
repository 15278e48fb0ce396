# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Time and memory of one UNet forward: dense, ours, tomesd and the ideal, side by side.

All contenders run in one process on one set of weights, in interleaved rounds, so that
what slows the machine down for a while slows all of them down. "Ideal" is what no method
of this kind can beat: the same sites get the first M of N tokens for free and are padded
with zeros afterwards, with no matching, merging or unmerging. The efficiency of a method is

    eta = (t_dense - t) / (t_dense - t_ideal)

1 = the machinery costs nothing, 0 = no faster than dense.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_SD15_BLOCKS = dict(layers_per_block=2, cross_attention_dim=768, attention_head_dim=8)
_SD15_INPUT = dict(context=(77, 768), factor=8, size=512)

# Shapes by name: UNet2DConditionModel arguments, context (tokens, width), pixels per latent place.
SHAPES = {
    "sd15": dict(
        unet=dict(
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            **_SD15_BLOCKS,
        ),
        **_SD15_INPUT,
    ),
    "sd15-level0": dict(
        unet=dict(
            block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            **_SD15_BLOCKS,
        ),
        **_SD15_INPUT,
    ),
    "small": dict(
        unet=dict(
            block_out_channels=(64, 128, 192),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            layers_per_block=1,
            cross_attention_dim=192,
            attention_head_dim=(1, 2, 3),
        ),
        context=(24, 192),
        factor=4,
        size=256,
    ),
}
CONTENDERS = ("dense", "ours", "tomesd", "ideal")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="sd15",
        help="UNet to build, with random weights: sd15 = Stable Diffusion 1.5 (860 M parameters), "
        "sd15-level0 = its finest level alone, where eta is measured without the noise of the "
        "rest, small = the size of the demo model (default: sd15)",
    )
    parser.add_argument("--size", type=int, help="picture side in pixels (default: the shape's)")
    parser.add_argument(
        "--batch",
        type=int,
        default=2,
        help="batch, 2 = one picture with classifier-free guidance (default: 2)",
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="tokens to remove (default: 0.5)")
    parser.add_argument(
        "--max-downsample", type=int, default=1, help="coarsest level to merge at (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", default="cuda" if _cuda() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU seconds of this process instead of wall time, for a machine that other "
        "programs use; take it with --threads 1, since threads that wait for each other count "
        "(default: wall)",
    )
    parser.add_argument("--quick", action="store_true", help="small shape, 5 rounds")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")
    args = parser.parse_args(argv)
    if args.quick:
        args.shape, args.rounds = "small", min(args.rounds, 5)
    if args.rounds < 3:
        parser.error("--rounds must be at least 3, or there is no spread to report")
    if args.clock == "cpu" and args.device.startswith("cuda"):
        parser.error("--clock cpu says nothing about a GPU; write --clock wall")
    if "dense" not in args.contenders:
        args.contenders.insert(0, "dense")
    if args.device.startswith("cuda") and not _cuda():
        parser.error("--device cuda: this torch finds no GPU; write --device cpu")
    args.size = args.size or SHAPES[args.shape]["size"]
    return args


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# --- contenders ----------------------------------------------------------------------------------


@contextmanager
def dense(unet, args):
    yield None


@contextmanager
def ours(unet, args):
    from mmagic_tome import apply_tome

    with apply_tome(unet, ratio=args.ratio, max_downsample=args.max_downsample) as handle:
        yield handle


@contextmanager
def tomesd(unet, args):
    import tomesd

    tomesd.apply_patch(unet, ratio=args.ratio, max_downsample=args.max_downsample)
    yield None
    tomesd.remove_patch(unet)


class _Take:
    """Pre-hook: the first M of N tokens, for free."""

    def __init__(self, ratio):
        self.ratio, self.removed = ratio, 0

    def __call__(self, module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        self.removed = int(x.shape[1] * self.ratio)
        kept = x[:, : x.shape[1] - self.removed]
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})


class _Pad:
    """Hook: zeros for the tokens that were not computed."""

    def __init__(self, take):
        self.take = take

    def __call__(self, module, args, kwargs, output):
        import torch.nn.functional as F

        return F.pad(output, (0, 0, 0, self.take.removed))


@contextmanager
def ideal(unet, args):
    from mmagic_tome.hosts import find_host

    host, network = find_host(unet)
    hooks = []
    for block in host.blocks(network):
        if block.downsample <= args.max_downsample:
            site = block.sites["attn"]
            take = _Take(args.ratio)
            hooks.append(site.register_forward_pre_hook(take, with_kwargs=True))
            hooks.append(site.register_forward_hook(_Pad(take), with_kwargs=True))
    yield None
    for hook in hooks:
        hook.remove()


# --- measuring -----------------------------------------------------------------------------------


class Meter:
    """Time and peak memory of one call."""

    def __init__(self, device, clock="wall"):
        import torch

        self.torch, self.cuda = torch, device.startswith("cuda")
        self.clock = time.process_time if clock == "cpu" else time.perf_counter

    def __call__(self, function):
        gc.collect()
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
            before = self.torch.cuda.memory_allocated()
        else:
            before = self._reset_resident()
        start = self.clock()
        out = function()
        if self.cuda:
            self.torch.cuda.synchronize()
        seconds = self.clock() - start
        if self.cuda:
            peak = self.torch.cuda.max_memory_allocated()
        else:
            peak = _status("VmHWM")
        return seconds, (peak - before) / 2**20 if peak and before else float("nan"), out

    @staticmethod
    def _reset_resident():
        """Give freed memory back, then make the kernel forget the peak (Linux only)."""
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return None
        return _status("VmRSS")


def _status(key):
    """A size in bytes out of /proc/self/status; None where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024


def measure(args) -> dict:
    """Run the rounds; seconds and MiB per contender and round."""
    import mmagic_tome  # noqa: F401, I001  (first: repairs a torchvision that does not fit torch)
    import torch
    from diffusers import UNet2DConditionModel
    from tqdm import tqdm

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    shape = SHAPES[args.shape]
    latent = args.size // shape["factor"]
    unet = UNet2DConditionModel(sample_size=latent, **shape["unet"])
    unet = unet.to(args.device, dtype).eval().requires_grad_(False)
    x = torch.randn(args.batch, 4, latent, latent, device=args.device, dtype=dtype)
    context = torch.randn(args.batch, *shape["context"], device=args.device, dtype=dtype)
    timestep = torch.tensor(500, device=args.device)
    contenders = {name: globals()[name] for name in args.contenders}

    meter = Meter(args.device, args.clock)
    results = {name: dict(seconds=[], mib=[]) for name in contenders}
    outputs = {}
    with torch.inference_mode(), tqdm(total=(args.rounds + 1) * len(contenders)) as bar:
        for index in range(args.rounds + 1):
            names = list(contenders)
            # Another order every round: nobody always runs after the slowest.
            names = names[index % len(names) :] + names[: index % len(names)]
            for name in names:
                bar.set_description(f"{'warm-up' if index == 0 else f'round {index}'}: {name}")
                with contenders[name](unet, args):
                    seconds, mib, out = meter(
                        lambda: unet(x, timestep, encoder_hidden_states=context).sample
                    )
                if index:
                    results[name]["seconds"].append(seconds)
                    results[name]["mib"].append(mib)
                else:
                    outputs[name] = out.float().cpu()
                del out
                bar.update()
    for name, out in outputs.items():
        difference = (out - outputs["dense"]).pow(2).mean().sqrt() / outputs["dense"].std()
        results[name]["relative_rmse_to_dense"] = difference.item()
        if name != "dense" and difference == 0:
            raise SystemExit(f"{name} changed nothing: it did not merge, its time means nothing")
    return dict(
        parameters=sum(p.numel() for p in unet.parameters()),
        tokens=latent * latent,
        results=results,
    )


# --- reporting -----------------------------------------------------------------------------------


def summarise(results: dict) -> list[dict]:
    """Medians over rounds, and of the per-round ratios to dense with their quartiles."""
    base = results["dense"]["seconds"]
    best = results.get("ideal", {}).get("seconds")
    rows = []
    for name, result in results.items():
        seconds = result["seconds"]
        speedup = [b / s for b, s in zip(base, seconds)]
        row = dict(
            contender=name,
            seconds=statistics.median(seconds),
            seconds_min=min(seconds),
            seconds_max=max(seconds),
            speedup=statistics.median(speedup),
            speedup_quartiles=_quartiles(speedup),
            peak_mib=statistics.median(result["mib"]),
        )
        if best:
            eta = [(b - s) / (b - i) for b, s, i in zip(base, seconds, best) if b != i]
            row.update(eta=statistics.median(eta), eta_quartiles=_quartiles(eta))
        rows.append(row)
    return rows


def _quartiles(values):
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| contender | s / forward (min - max) | x dense (quartiles) | eta (quartiles) "
        "| peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["speedup_quartiles"]
        eta = "-"
        if "eta" in row:
            eta = "{:.3f} ({:.3f} - {:.3f})".format(row["eta"], *row["eta_quartiles"])
        lines.append(
            f"| {row['contender']} | {row['seconds']:.3f} "
            f"({row['seconds_min']:.3f} - {row['seconds_max']:.3f}) "
            f"| {row['speedup']:.3f} ({low:.3f} - {high:.3f}) | {eta} "
            f"| {row['peak_mib']:.0f} MiB |"
        )
    for row in rows:
        low, high = row["speedup_quartiles"]
        if row["contender"] != "dense" and low <= 1 <= high:
            lines.append(
                f"\n{row['contender']}: the spread of the rounds is larger than its effect; "
                "this says nothing about speed. Use more --rounds or a quieter machine."
            )
    return "\n".join(lines)


def environment(args) -> dict:
    """Where and with what the figures were measured."""
    import diffusers
    import torch

    import mmagic_tome

    cpu = platform.processor() or platform.machine()
    with suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    try:
        from importlib.metadata import version

        peer = version("tomesd")
    except Exception:
        peer = None
    return dict(
        device=torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu,
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        load_average=list(os.getloadavg()),
        python=platform.python_version(),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        tomesd=peer,
        mmagic_tome=mmagic_tome.__version__,
    )


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        measured = measure(args)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing written") from None
    rows = summarise(measured["results"])
    where = environment(args)
    print(
        f"\n{args.shape}, {measured['parameters'] / 1e6:.0f} M parameters, {args.size}x{args.size}"
        f" ({measured['tokens']} tokens), batch {args.batch}, {args.dtype}, ratio {args.ratio:g}, "
        f"self-attention up to downsample {args.max_downsample}, {args.rounds} rounds, "
        f"{'CPU seconds of the process' if args.clock == 'cpu' else 'wall time'}"
    )
    print(", ".join(f"{key} {value}" for key, value in where.items()), end="\n\n")
    print(table(rows))
    if args.json:
        path = Path(args.json)
        content = dict(
            command=["python", "tools/benchmark.py", *(argv if argv is not None else sys.argv[1:])],
            options=vars(args),
            environment=where,
            summary=rows,
            **measured,
        )
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
