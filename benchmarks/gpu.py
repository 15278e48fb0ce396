#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Everything that is to be measured on a GPU, within eight minutes on a card of the H100 class.

==========  ==========================================================  ====================
part        what is measured                                            file in ``data``
==========  ==========================================================  ====================
attention   attention without weights of keys, with a mask, with        gpu_attention
            further channels
eager       whole networks with merging: speed-up, peak memory          gpu_networks
compiled    the same after ``torch.compile``                            gpu_networks
caching     a computed step, a skipped step                             gpu_caching
frontier    the demo model: time and fidelity of settings               gpu_frontier
==========  ==========================================================  ====================

Each part is a process of its own with a time limit. What it has measured stays in ``--work-dir``,
so a second call goes on; the files are written from what is there, after every call::

    python benchmarks/gpu.py                                  # all parts, then: make figures
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --device cpu --parts attention
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from mmagic_tome import ToMeError
from mmagic_tome.assets import asset_path
from mmagic_tome.lab.benchmark import benchmark
from mmagic_tome.lab.environment import environment
from mmagic_tome.lab.evaluate import evaluate
from mmagic_tome.lab.measure import StepMarks, interleaved, timed
from mmagic_tome.lab.methods import BASELINE, Method
from mmagic_tome.lab.networks import NETWORKS, share_weights, work_on
from mmagic_tome.lab.plan import plan_of
from mmagic_tome.lab.report import save_record, write_report
from mmagic_tome.lab.results import RunFolder
from mmagic_tome.lab.runners import open_source
from mmagic_tome.lab.table import table
from mmagic_tome.merging.proportional import attention_with_channels, log_sizes

# Part -> seconds; 480 together.
LIMITS = {"attention": 40, "eager": 130, "compiled": 170, "caching": 50, "frontier": 90}
ROUNDS = 7
# Name -> (heads, queries, keys, head size), after merging half of the image's tokens.
ATTENTION = {
    "SD 1.5, 512²": (8, 2048, 2048, 40),
    "SD 1.5, 512², attn_kv": (8, 4096, 2048, 40),
    "SDXL, 1024²": (10, 2048, 2048, 64),
    "ViT-B/16, 224²": (12, 149, 149, 64),
    "SD 3, 1024²": (24, 2381, 2381, 64),
    "Flux, 1024²": (24, 2560, 2560, 128),
    "SD 1.5, 1024²": (8, 8192, 8192, 40),
}
# Network and pixels of a side, in the order in which they are measured.
CASES = [("sd15", 512), ("sd15", 1024), ("sdxl", 1024), ("sd3", 1024), ("flux", 1024)]
METHODS = [
    dict(name="ToMe 0.5, keys and values", tome_cfg=dict(ratio=0.5)),
    dict(name="ToMe 0.5", tome_cfg=dict(ratio=0.5, targets="attn")),
    dict(name="ToMe 0.5, unweighed", tome_cfg=dict(ratio=0.5, prop_attn=False)),
    dict(name="ToMe 0.5, blocks", tome_cfg=dict(ratio=0.5, targets="block")),
]
# Every second step is skipped; a tolerance that nothing exceeds skips as often as it can.
CACHES = {"interval 2": dict(region="network", interval=2), "tolerance": dict(tolerance=0.99)}


class Bench:
    """Where and how large to measure, and the folder of what was found."""

    def __init__(self, device: str, work_dir: Path, small: bool) -> None:
        self.device, self.work_dir, self.small = torch.device(device), work_dir, small
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.batches = [2, 8] if self.on_gpu and not small else [2]
        self.rounds = 2 if small else ROUNDS

    def cases(self) -> list[tuple[str, int, int]]:
        """(network, pixels, batch), small batches first."""
        cases = [("small", 64)] if self.small else CASES
        return [(*case, batch) for batch in self.batches for case in cases]

    def folder(self, *names: str) -> RunFolder:
        """Of a part or a case of it."""
        return RunFolder(self.work_dir.joinpath(*names))

    def manifest(self, part: str) -> dict[str, Any]:
        """What the rows of a part depend on."""
        return {"command": part, "small": self.small, "environment": environment(self.device)}


def say(*words: Any) -> None:
    """Progress."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def missing(folder: RunFolder, methods: Iterable[str], rounds: int, **keys: Any) -> range:
    """The rounds that some method lacks."""
    turns = [{row["turn"] for row in folder.find(method=one, **keys)} for one in methods]
    return range(min(map(len, turns), default=0), rounds)


# --- parts ----------------------------------------------------------------------------------------


def attention(bench: Bench) -> None:
    """Time of a call of ``scaled_dot_product_attention`` by how keys are weighed."""
    shapes = {"small": (2, 64, 32, 40)} if bench.small else ATTENTION
    dtypes = [bench.dtype] if bench.on_gpu else [torch.float32, torch.bfloat16]
    with bench.folder("attention").writing(bench.manifest("attention")) as folder:
        for batch in bench.batches:
            for (name, shape), dtype in ((one, d) for one in shapes.items() for d in dtypes):
                case = f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}"
                calls = _attention_calls(batch, *shape, dtype, bench.device)
                turns = missing(folder, calls, bench.rounds, case=case)
                if not turns:
                    continue
                for call in calls.values():
                    call()
                # Long enough for the clock: about ten milliseconds.
                repeats = max(1, min(200, round(0.01 / _repeat(bench, 1, calls["baseline"]))))
                runs = {one: partial(_repeat, bench, repeats, calls[one]) for one in calls}
                for turn, method, seconds in interleaved(runs, turns):
                    row = dict(kind="attention", case=case, method=method, turn=turn)
                    folder.add(row | {"seconds": seconds})
                say(case)


def _attention_calls(
    batch: int, heads: int, queries: int, keys: int, width: int, dtype: Any, device: Any
) -> dict[str, Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> torch.Tensor:
        # As a projection leaves it.
        x = torch.randn(batch, count, heads, width, generator=generator)
        return x.to(device, dtype).transpose(1, 2)

    q, k, v = noise(queries), noise(keys), noise(keys)
    size = torch.randint(1, 5, (batch, keys), generator=generator).to(device)
    log_size = log_sizes(size, dtype)
    mask = log_size.to(dtype)[:, None, None]
    return {
        "baseline": lambda: F.scaled_dot_product_attention(q, k, v),
        "mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "channels": lambda: attention_with_channels(q, k, v, log_size),
    }


def _repeat(bench: Bench, repeats: int, call: Callable[[], Any]) -> float:
    """Seconds per call."""

    def several() -> None:
        for _ in range(repeats):
            call()

    with torch.inference_mode():
        return timed(several, bench.device)[0] / repeats


def networks(bench: Bench, mode: str) -> None:
    """Whole networks: all methods of a case interleaved, each case in a folder of its own."""
    methods = [Method.from_dict(one) for one in METHODS]
    for name, pixels, batch in bench.cases():
        folder = bench.folder(mode, f"{name}-{pixels}-{batch}")
        known = [BASELINE.name, *(row["method"] for row in folder.find(kind="memory"))]
        if folder.manifest and not missing(folder, known, bench.rounds, kind="round"):
            continue
        began = time.perf_counter()
        try:
            benchmark(
                name, methods, (pixels, pixels), batch, bench.dtype, 1, bench.rounds,
                folder.path, bench.device, mode=mode,
            )  # fmt: skip
        except (ToMeError, torch.OutOfMemoryError) as error:
            say(f"{name}, {pixels}², batch {batch}: {error}")
            continue
        say(f"{name}, {pixels}², batch {batch}, {mode}: {time.perf_counter() - began:.0f} s")


def caching(bench: Bench) -> None:
    """Seconds of a computed and of a skipped step, of step caching in a network's whole call."""
    steps = 8
    with bench.folder("caching").writing(bench.manifest("caching")) as folder:
        for name, pixels, batch in bench.cases():
            case = f"{name}, {pixels}², batch {batch}"
            methods = [Method.from_dict(dict(name=n, cache_cfg=c)) for n, c in CACHES.items()]
            turns = missing(folder, CACHES, bench.rounds, case=case)
            if not turns:
                continue
            entry, size = NETWORKS[name], (pixels, pixels)
            work = work_on(entry, entry.build(bench.device, bench.dtype), size, batch, steps)
            calls = {one.name: partial(_steps, bench, work, one) for one in methods}
            with torch.inference_mode():
                for call in calls.values():
                    call()
                for turn, method, found in interleaved(calls, turns):
                    folder.add(dict(kind="caching", case=case, method=method, turn=turn, **found))
            del work, calls
            say(case)


def _steps(bench: Bench, work: Any, method: Method) -> dict[str, Any]:
    """Seconds of each step of a run by what was done."""
    network = share_weights(work.network)
    model = SimpleNamespace(unet=network, scheduler=work.scheduler)
    with method.on(model) as handles:
        with StepMarks(network, bench.device) as marks:
            work(network)
        skipped = sum(row["skipped"] for row in handles.cache.stats())
    seconds = sorted(marks.seconds())
    return {"computed": seconds[skipped:], "skipped": seconds[:skipped]}


def frontier(bench: Bench) -> None:
    """The demo model: named settings, merging, and fewer steps."""
    source = open_source(None, None, str(asset_path("demo_model")), {})
    plan = plan_of(
        source,
        prompts="demo",
        limit=2 if bench.small else 32,
        methods=["cache:quality", "cache:balanced", "cache:fast", METHODS[0]],
        fewer_steps=[0.5] if bench.small else [0.8, 0.65, 0.5, 0.4],
        metrics=["psnr", "latent_error"],
        rounds=bench.rounds,
        steps=4 if bench.small else 20,
        guidance=3.0,
        batch_size=2 if bench.small else 8,
        size=(64, 64) if bench.small else (128, 128),
    )
    folder = bench.folder("frontier")
    evaluate(source, folder=folder, device=bench.device, progress=False, **vars(plan))
    write_report(folder)
    say(f"demo model, {len(plan.methods)} methods")


PARTS: dict[str, Callable[[Bench], None]] = {
    "attention": attention,
    "eager": partial(networks, mode="eager"),
    "compiled": partial(networks, mode="compiled"),
    "caching": caching,
    "frontier": frontier,
}

# --- records --------------------------------------------------------------------------------------


def collect(bench: Bench, out: Path) -> list[Path]:
    """Write the files of what was measured; return them."""
    prefix, written = "gpu" if bench.on_gpu else "cpu", []
    both = ("computed", "skipped")
    found = {
        "attention": _rounds(bench, "attention", lambda row: {"round_seconds": row["seconds"]}),
        "caching": _rounds(bench, "caching", lambda row: {key: row[key] for key in both}),
        "networks": [row for mode in ("eager", "compiled") for row in _networks(bench, mode)],
    }
    settings = dict(model="random weights")
    records = {name: (settings, rows) for name, rows in found.items() if rows}
    report = bench.folder("frontier").path / "results.json"
    if report.exists():
        record = json.loads(report.read_text(encoding="utf-8"))
        records["frontier"] = record["settings"], record["rows"]
    for name, record in records.items():
        written.append(out / f"{prefix}_{name}.json")
        save_record(written[-1], *record, {"environment": environment(bench.device)})
    return written


def _rounds(bench: Bench, part: str, values: Callable[[dict], dict]) -> list[dict[str, Any]]:
    """A row per case and method of whole cases; interrupted rounds were measured again."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    found = bench.folder(part).find(kind=part)
    last = {(row["turn"], row["case"], row["method"]): row for row in found}
    for row in sorted(last.values(), key=lambda row: row["turn"]):
        held = rows.setdefault((row["case"], row["method"]), {})
        for key, value in values(row).items():
            held.setdefault(key, []).append(value)
    short = {
        case
        for (case, _), one in rows.items()
        if any(len(values) < bench.rounds for values in one.values())
    }
    return [
        {"case": case, "method": method, **one}
        for (case, method), one in rows.items()
        if case not in short
    ]


def _networks(bench: Bench, mode: str) -> list[dict[str, Any]]:
    rows = []
    for name, pixels, batch in bench.cases():
        folder = bench.folder(mode, f"{name}-{pixels}-{batch}")
        case = f"{name}, {pixels}², batch {batch}, {mode}"
        for row in json.loads(table(folder).to_json(orient="records")):
            rounds = folder.find(kind="round", method=row["method"])
            seconds = [*{one["turn"]: one["seconds"] for one in rounds}.values()]
            if len(seconds) == bench.rounds:
                row = {key: row[key] for key in ("method", "memory", "relative_error")}
                dtype = folder.manifest["dtype"]
                rows.append({"case": case, "dtype": dtype, **row, "round_seconds": seconds})
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for, each in a process of its own; then write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/gpu"))
    parser.add_argument("--seconds-per-part", type=float, help=f"default: {LIMITS}")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # this process is its own
    args = parser.parse_args(given)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no GPU here; write --device cpu, and --small to try the script")
    bench = Bench(args.device, args.work_dir, args.small)
    if args.part:
        PARTS[args.part](bench)
        return
    own = [sys.executable, __file__, *map(str, sys.argv[1:] if given is None else given)]
    for part in args.parts:
        limit = args.seconds_per_part or LIMITS[part]
        say(f"{part}: at most {limit:g} s")
        try:
            code = subprocess.run([*own, "--part", part], timeout=limit, check=False).returncode
            say(f"{part}: {'done' if code == 0 else f'failed with exit status {code}'}")
        except subprocess.TimeoutExpired:
            say(f"{part}: out of time; the same command goes on with it")
    args.out.mkdir(parents=True, exist_ok=True)
    for path in collect(bench, args.out):
        say(path)


if __name__ == "__main__":
    main()
