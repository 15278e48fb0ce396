# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``evaluate --dry-run``: every check that needs no model, all at once, and what it would take."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..apis.model_config import inner_model
from ..errors import ToMeError
from .plan import Plan
from .real import find_real
from .scores import build_metrics, default_names
from .store import RunFolder, free_bytes

# PNG of a photograph, per byte of pixels; a rough upper bound.
PNG_SHARE = 0.75
# Final latents are float32, 4 channels, 1/64 of the pixels of a channel, and do not compress.
LATENT_SHARE = 4 * 4 / (64 * 3)
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.ckpt", "*.pth", "*.pt")


def dry_run(args, config, plan: Plan, device) -> None:
    """Print what an evaluation would do and everything that is missing for it.

    Args:
        args: Options of the command.
        config: mmengine's ``Config``.
        plan: The plan; what could be wrong with prompts and contenders was found with it.
        device: Where it would run.

    Raises:
        ToMeError: At the end, if anything is missing.
    """
    count = len(plan.prompts.prompts)
    problems: list[str] = []
    print(f"{args.config}: {count} pictures of {plan.prompts.source}, on {device}")
    for note in plan.prompts.notes:
        print(f"  note: {note}")
    forwards = 0
    print(f"contenders ({len(plan.contenders)}):")
    for contender in plan.contenders:
        steps = contender.steps or plan.steps
        forwards += steps * count
        print(f"  {contender.name:24} {steps} steps")

    print("model weights:")
    for part, name, found in model_weights(inner_model(config)):
        print(f"  {part:16} {name}: {'there' if found else 'MISSING'}")
        if not found:
            problems.append(f"weights of {part}: {name} is neither a folder nor in the hub's cache")

    print("metrics:")
    for entry in default_names() if plan.metrics is None else plan.metrics:
        # One by one: the reader wants to know of all that is missing, not of the first.
        try:
            built = build_metrics([entry], device, count, plan.size)
            (name,) = built.named
            print(f"  {name}: ready")
        except ToMeError as error:
            print(f"  {entry}: NOT READY")
            problems.append(f"metric {entry}: {error}")

    if plan.real is not None:
        try:
            real = find_real(plan.real, plan.size or (256, 256), plan.real_per_class)
            print(f"real pictures: {len(real)}")
            for note in real.notes:
                print(f"  note: {note}")
        except ToMeError as error:
            print("real pictures: MISSING")
            problems.append(str(error))

    _print_size(args, plan, forwards, problems)
    if problems:
        print(f"\n{len(problems)} problems:")
        for problem in problems:
            print(f"  - {problem}")
        raise ToMeError(f"dry run: {len(problems)} problems, listed above")
    print("\neverything is there; run the same command without --dry-run")


def _print_size(args, plan: Plan, forwards: int, problems: list[str]) -> None:
    height, width = plan.size or (512, 512)
    pictures = len(plan.prompts.prompts) * len(plan.contenders)
    needed = pictures * height * width * 3 * (PNG_SHARE + LATENT_SHARE)
    free = free_bytes(Path(args.folder))
    held = RunFolder(args.folder).manifest()
    state = "new" if held is None else "holds an evaluation; a run with the same settings goes on"
    print(f"folder: {args.folder} ({state}), {free / 1e9:.1f} GB free")
    guess = "" if plan.size else " (if the model makes 512x512)"
    print(
        f"it takes: {pictures} pictures, {forwards} forwards of the network over one picture, "
        f"at most {needed / 1e9:.2f} GB of disk{guess}, then {plan.cost_rounds} rounds of timing"
    )
    if needed > free:
        problems.append(f"{needed / 1e9:.1f} GB of disk may be needed, {free / 1e9:.1f} are free")


def model_weights(model: Any) -> list[tuple[str, str, bool]]:
    """Return (part, name, whether it is there) for everything a model loads by name.

    Nothing is loaded or downloaded: a name is a local folder with weights in it, or in the
    cache of the model hub.
    """
    found = []
    for part, entry in dict(model).items():
        if part == "tokenizer" and isinstance(entry, str):
            found.append((part, entry, _is_there(entry, "tokenizer", ("vocab.json", "tokenizer*"))))
        if not isinstance(entry, dict):
            continue
        name = entry.get("from_pretrained") or entry.get("pretrained_model_name_or_path")
        if not isinstance(name, str):
            continue
        files = ("scheduler_config.json",) if "scheduler" in part else WEIGHT_FILES
        found.append((part, name, _is_there(name, entry.get("subfolder") or "", files)))
    return found


def _is_there(name: str, subfolder: str, patterns) -> bool:
    for folder in (Path(name).expanduser() / subfolder, Path(name).expanduser()):
        if folder.is_dir():
            return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
    if importlib.util.find_spec("huggingface_hub") is None or name.startswith(("/", ".", "~")):
        return False
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return any(
        next(cached.glob(f"*/{subfolder}/{pattern}" if subfolder else f"*/{pattern}"), None)
        is not None
        for pattern in patterns
    )
