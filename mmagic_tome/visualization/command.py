# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What ``tools/visualize.py`` does after its own cheap checks in ``cli.py``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from ..apis.infer import environment, make_request, quiet_libraries
from ..apis.model_config import (
    build_model,
    check_config,
    check_device,
    inner_model,
    load_config,
    setting_config,
)
from ..apis.pictures import FULL_SCALE, ResultFolder, file_stem, picture_difference
from ..apis.text2image import Generator
from ..apply import apply_tome
from ..cache import to_plain
from ..errors import ToMeError
from ..settings import Handles
from .cost_plot import cost_plot, cost_rows
from .error_map import error_map
from .recorder import PlanRecorder
from .sheets import grid_sheet, merge_sheet, save_gif, step_frames


def command(args, argv: list[str]) -> None:
    """Generate and draw; see ``cli.py`` for ``args``.

    Raises:
        ToMeError: for input that cannot work, before a model is loaded where the config tells.
    """
    device = check_device(args.device)
    config = load_config(args.config_path, args.cfg_options)
    request = make_request(args, config)
    options = {} if args.ratio is None else {"ratio": args.ratio}
    check_config(config, request, options, compare=True)
    setting = setting_config(config).replace(**options)
    if setting.tome is None:
        raise ToMeError(
            "the config merges no tokens (step caching alone has no merge maps), so there is "
            "nothing to draw; add tome_cfg=dict(ratio=0.5) to it, or pass --ratio 0.5"
        )

    quiet_libraries()
    print(f"building {inner_model(config).type} of {args.config} on {device}")
    model = build_model(config, device, args.dtype)
    generator = Generator(model, request)
    handles = Handles.of(model)
    if handles.tome is None or options:
        handles = Handles(apply_tome(model, setting.tome), handles.cache)
    handle = handles.tome
    blocks = _chosen_blocks(handle, args.block)
    folder = ResultFolder(args.folder, overwrite=args.overwrite)

    runs = 2 * len(request.prompts) + 1
    slow = 0.1 if sys.stderr.isatty() else 10.0
    images, files = [], {}
    with tqdm(total=runs * request.steps, unit="step", leave=False, mininterval=slow) as bar:
        for number, prompt in enumerate(request.prompts):
            bar.set_description(f"picture {number + 1} of {len(request.prompts)}", False)
            if number == 0:
                report = _profile(generator, handles, model, bar.update)
                files["cost"] = "cost.png"
                where = environment(device)
                title = f"{Path(args.config).stem}, {handles.description}: time of each target"
                title += f" on {device}{_busy(where)}"
                with folder.new_file("cost.png") as path:
                    cost_plot(path, report, title)
            with handles.disabled():
                dense = generator.run([number], on_step=bar.update)[0][0]
            with PlanRecorder(model) as recorder:
                merged = generator.run([number], on_step=bar.update)[0][0]
            records = [record for record in recorder.records if record.block in blocks]
            if not records:
                raise ToMeError(
                    "nothing was merged in this run, so there is nothing to draw: the grids are "
                    "too small or the options merge nothing; pass a larger --size or --ratio"
                )
            names = _write(folder, file_stem(number, prompt), prompt, dense, merged, records, args)
            images.append(
                {
                    "prompt": prompt,
                    "seed": request.seed_of(number),
                    **names,
                    **picture_difference(dense, merged),
                }
            )
    result = {
        "command": ["visualize", *argv],
        "token_merging": handle.config.to_record(),
        **({} if handles.cache is None else {"step_caching": to_plain(handles.cache.config)}),
        "images": images,
        **files,
        "cost_ms": cost_rows(report),
        "environment": where,
    }
    folder.save_json("result.json", result)
    print(f"\nPictures of {len(images)} prompts, cost.png and result.json: {folder.path}")
    for image in images:
        print(f"  {image['merge_sheet']}  {image['merge_gif']}  {image['error_map']}")


def _busy(where: dict) -> str:
    """A warning for the title where other programs used the machine during the measurement."""
    load, cores = where["load_average_1min"], where["cpus"]
    if load is None or load <= cores + 0.5:
        return ""
    return f"\nother programs used this machine (load {load:.1f}, {cores} cores): mostly noise"


def _chosen_blocks(handle, wanted: list[str]) -> set[str]:
    names = list(dict.fromkeys(site["block"] for site in handle.stats()))
    chosen = {name for name in names if not wanted or any(text in name for text in wanted)}
    if not chosen:
        raise ToMeError(f"no merged block has {' or '.join(wanted)} in its name: {names}")
    return chosen


def _profile(generator, handles, model, on_step) -> dict:
    """Times of the targets over a dense and a merged run."""
    from ..mmagic.hooks.profile import Recorder

    steps = generator.request.steps
    for mode in (handles.disabled, nullcontext):  # warm-up
        with mode():
            generator.run([0], 1)
    recorder = Recorder(model, 0, 2 * steps)
    half = max(1, steps // 2)
    for mode in (handles.disabled, nullcontext):
        with mode():
            generator.run([0], half, on_step=on_step)
    recorder.close()
    return recorder.report()


def _write(folder, stem, prompt, dense, merged, records, args) -> dict[str, str]:
    """Write all pictures of a prompt; return their names."""
    text = {"prompt": prompt}
    names = {
        "file": f"{stem}.png",
        "dense_file": f"{stem}_dense.png",
        "merge_sheet": f"{stem}_merge.png",
        "merge_gif": f"{stem}_merge.gif",
        "error_map": f"{stem}_error.png",
    }
    folder.save_png(names["file"], merged, text)
    folder.save_png(names["dense_file"], dense, text)
    sheet = merge_sheet(prompt, records, merged, args.columns)
    folder.save_png(names["merge_sheet"], sheet, text)
    with folder.new_file(names["merge_gif"]) as path:
        save_gif(path, step_frames(prompt, records, merged))
    factor = max(1, -(-256 // merged.width))
    size = (merged.width * factor, merged.height * factor)
    pictures = [picture.resize(size, 0) for picture in (dense, merged, error_map(dense, merged))]
    difference = picture_difference(dense, merged)
    psnr = difference["psnr_db"]
    title = f"{prompt}: " + ("identical" if psnr is None else f"PSNR {psnr:.1f} dB")
    title += f", mean difference {difference['mean_abs_difference']:.1f} of 255"
    heads = ["dense", "merged", f"difference, up to {FULL_SCALE} of 255"]
    folder.save_png(names["error_map"], grid_sheet(title, heads, [("", pictures)]), text)
    return names
