# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What ``tools/visualize.py --input`` does: which tokens of a vision transformer became one.

The config's ``model`` is a vision transformer, with ``type='ToMe'`` around it or without, and its
``vit_input`` says what it is given::

    vit_input = dict(kind="image", size=224, patch=14, mean=(...), std=(...))
    vit_input = dict(kind="video", size=112, patch=14, frames=8, tubelet=1, mean=(...), std=(...))
    vit_input = dict(kind="audio")   # Whisper: 30 seconds, 1500 tokens
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from tqdm import tqdm

from ..apis.model_config import check_device
from ..apis.model_config import load_config as read_config
from ..apis.pictures import ResultFolder
from ..errors import ToMeError
from ..vit import ViTConfig, ViTHandle, apply_options, find_vit, get_vit_handle
from .sheets import grid_sheet, save_gif
from .token_maps import clip_maps, followed, followed_maps, picture_map, spectrogram_map

KINDS = ("image", "video", "audio")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_KEYS = {
    "image": ("size", "patch", "mean", "std"),
    "video": ("size", "patch", "frames", "tubelet", "mean", "std"),
    "audio": (),
}
# Whisper's: samples per second, seconds of an input, tokens of it.
RATE, SECONDS, TOKENS = 16000, 30, 1500
# Tokens in a row of a spectrogram: six seconds.
_ROW = 300


def command(args, argv: list[str]) -> None:
    """Read, run and draw; see ``cli.py`` for ``args``.

    Raises:
        ToMeError: for input that cannot work, before a model is built.
    """
    device = check_device(args.device)
    config = load_config(args.config_path, args.cfg_options)
    expects = config["vit_input"]
    inputs = [(Path(name), read_input(Path(name), expects)) for name in args.input]
    print(f"building {_inner_type(config['model'])} of {args.config}")
    model, handle = build(config, args.r)
    model.to(device)
    folder = ResultFolder(args.folder, overwrite=args.overwrite)
    blocks = [block.name for block in find_vit(model).blocks]
    drawn = []
    for number, (path, given) in enumerate(tqdm(inputs, unit="input", disable=None)):
        sources = record_sources(handle, tensor_of(given, expects).to(device))
        name = f"{number:04d}_{path.stem}"
        chosen = [
            place for place in spread(len(sources), args.columns) if sources[place] is not None
        ]
        if not chosen:
            raise ToMeError("nothing was merged, so there is nothing to draw: a larger --r")
        draw = {"image": draw_image, "video": draw_video, "audio": draw_audio}[expects["kind"]]
        tokens = [after for _, after in handle.tokens]
        still, frames = draw(path.stem, given, expects, sources, chosen, tokens)
        folder.save_png(f"{name}_tokens.png", still, {"input": path.name})
        with folder.new_file(f"{name}_tokens.gif") as temporary:
            save_gif(temporary, frames)
        drawn.append(
            {"input": path.name, "sheet": f"{name}_tokens.png", "gif": f"{name}_tokens.gif"}
        )
    result = {
        "command": ["visualize", *argv],
        "token_merging": {key: str(value) for key, value in handle.config.to_dict().items()},
        "blocks": blocks,
        "tokens": handle.tokens,
        "images": drawn,
    }
    folder.save_json("result.json", result)
    print(f"\n{len(drawn)} sheets and GIFs: {folder.path}")
    for one in drawn:
        print(f"  {one['sheet']}  {one['gif']}")


def load_config(path: Path, options: list[str]) -> Any:
    """A config with a checked ``vit_input``.

    Raises:
        ToMeError: it has none, or a wrong one.
    """
    config = read_config(path, options)
    expects = config.get("vit_input")
    if not isinstance(expects, dict):
        raise ToMeError(
            f"--input is for configs of vision transformers, with model and vit_input; {path} is "
            "none (see configs/vit)"
        )
    kind = expects.get("kind")
    if kind not in KINDS:
        raise ToMeError(f"kind in vit_input must be one of {', '.join(KINDS)}, got {kind!r}")
    missing = [key for key in _KEYS[kind] if key not in expects]
    if missing:
        raise ToMeError(f"vit_input of kind {kind!r} needs {missing[0]}")
    return config


def _inner_type(model: dict) -> str:
    return model["model"]["type"] if model.get("type") == "ToMe" else model.get("type")


def build(config: Any, r: int | None) -> tuple[torch.nn.Module, ViTHandle]:
    """The model, merged as its config says or by ``r``, noting where tokens come from."""
    from mmengine.registry import MODELS

    model = MODELS.build(config["model"]).eval()
    handle = get_vit_handle(model)
    config = ViTConfig() if handle is None else handle.config
    if r is not None:
        config = config.replace(r=r)
    return model, apply_options(model, config, trace_source=True)


@torch.inference_mode()
def record_sources(handle: ViTHandle, x: torch.Tensor) -> list[np.ndarray | None]:
    """Per block, (n,) the token that holds each unprotected token of the first; None before
    anything was merged."""
    vit, found = find_vit(handle.network), []

    def note(module, args, output) -> None:
        source = handle._patch.context.source
        found.append(None if source is None else source[0, vit.prefix :].cpu().numpy().copy())

    hooks = [block.module.register_forward_hook(note) for block in vit.blocks]
    try:
        handle.network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly, with the last."""
    return sorted(
        {count - 1 - round(step * count / min(most, count)) for step in range(min(most, count))}
    )


# --- reading --------------------------------------------------------------------------------------


def read_input(path: Path, expects: dict) -> Any:
    """A picture, a list of frames, or (samples,) float32 of a recording.

    Raises:
        ToMeError: no such file, or not what the config's model takes.
    """
    if not path.exists():
        raise ToMeError(f"--input {path}: no such file")
    if expects["kind"] == "audio":
        return _read_wave(path)
    try:
        if expects["kind"] == "image":
            if path.is_dir():
                raise ToMeError(f"--input {path} is a folder; this config's model takes pictures")
            return _square(Image.open(path), expects["size"])
        frames = _read_frames(path)
    except (UnidentifiedImageError, OSError) as error:
        raise ToMeError(f"--input {path} is no picture that can be read: {error}") from error
    wanted = expects["frames"]
    if len(frames) < wanted:
        raise ToMeError(f"--input {path} has {len(frames)} frames; this config takes {wanted}")
    places = np.linspace(0, len(frames) - 1, wanted).round().astype(int)
    return [_square(frames[place], expects["size"]) for place in places]


def _read_frames(path: Path) -> list[Image.Image]:
    """The pictures of a folder by name, or the frames of a GIF, WebP or PNG."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        return [Image.open(file) for file in files]
    with Image.open(path) as clip:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]


def _square(picture: Image.Image, size: int) -> Image.Image:
    """The middle square on white, resized."""
    picture = picture.convert("RGBA")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def _read_wave(path: Path) -> np.ndarray:
    try:
        with wave.open(str(path)) as sound:
            width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            data = sound.readframes(min(sound.getnframes(), SECONDS * rate))
    except (wave.Error, EOFError, OSError) as error:
        raise ToMeError(f"--input {path} is no WAV file: {error}") from error
    if width != 2:
        raise ToMeError(f"--input {path} has {8 * width} bits per sample; write it with 16")
    samples = np.frombuffer(data, "<i2").reshape(-1, channels).mean(1) / 32768
    if not len(samples):
        raise ToMeError(f"--input {path} holds no sound")
    if rate != RATE:
        from scipy.signal import resample_poly

        samples = resample_poly(samples, RATE, rate)
    return samples.astype(np.float32)


def tensor_of(given: Any, expects: dict) -> torch.Tensor:
    """What the model is called with: a batch of one."""
    if expects["kind"] == "audio":
        return torch.from_numpy(spectrogram_of(given))[None]
    frames = given if isinstance(given, list) else [given]
    x = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    x = x.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(expects[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (x - mean) / std
    return x[None] if expects["kind"] == "video" else x


def spectrogram_of(samples: np.ndarray) -> np.ndarray:
    """(80, 3000) Whisper's logarithmic mel spectrogram."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    return extract(samples, sampling_rate=RATE, return_tensors="np").input_features[0]


# --- drawing --------------------------------------------------------------------------------------


def draw_image(title, picture, expects, sources, chosen, tokens):
    """(sheet of some blocks, frames over all blocks)."""
    side = expects["size"] // expects["patch"]
    large = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC)

    def painted(place: int) -> Image.Image:
        source = sources[place]
        return large if source is None else picture_map(source, (side, side), large)

    heads = ["picture", *[_head(place, tokens) for place in chosen]]
    size = painted(chosen[0]).size
    pictures = [large.resize(size), *[painted(place) for place in chosen]]
    still = grid_sheet(title, heads, [("", pictures)])
    frames = [
        grid_sheet(
            title,
            ["picture", _head(place, tokens)],
            [("", [large.resize(size), painted(place).resize(size)])],
        )
        for place in range(len(sources))
    ]
    return still, frames


def draw_video(title, clip, expects, sources, chosen, tokens):
    """(sheet of the last block over the frames, the same frame by frame)."""
    side, source = expects["size"] // expects["patch"], sources[chosen[-1]]
    grid = (len(clip) // expects["tubelet"], side, side)
    large = [f.resize((2 * f.width, 2 * f.height), Image.Resampling.BICUBIC) for f in clip]
    merged = clip_maps(source, grid, large)
    groups = followed(source, grid)
    traced = followed_maps(source, grid, large, groups)
    text = f"{title}, {_head(chosen[-1], tokens)}"
    rows = [("frames", large), ("merged", merged), (f"{len(groups)} tokens", traced)]
    still = grid_sheet(text, [f"frame {place + 1}" for place in range(len(clip))], rows)
    heads = [name for name, _ in rows]
    frames = [
        grid_sheet(text, heads, [("", [pictures[place] for _, pictures in rows])])
        for place in range(len(clip))
    ]
    return still, frames


def draw_audio(title, samples, expects, sources, chosen, tokens):
    """(sheet: rows of six seconds, dense and merged by the last block; rows block by block)."""
    spectrogram = spectrogram_of(samples)
    rows = min(-(-len(samples) * TOKENS // (SECONDS * RATE * _ROW)), TOKENS // _ROW)
    wholes = {None: spectrogram_map(None, spectrogram)}
    for place, source in enumerate(sources):
        wholes[place] = spectrogram_map(source, spectrogram)

    def cut(key: int | None, row: int) -> Image.Image:
        width = wholes[None].width * _ROW // TOKENS
        return wholes[key].crop((row * width, 0, (row + 1) * width, wholes[None].height))

    lines = []
    for row in range(rows):
        lines.append((f"{row * _ROW * SECONDS // TOKENS} s", [cut(None, row)]))
        lines.append((f"{tokens[chosen[-1]]} tokens", [cut(chosen[-1], row)]))
    still = grid_sheet(f"{title}, {_head(chosen[-1], tokens)}", [""], lines)
    frames = [
        grid_sheet(
            f"{title}, {_head(place, tokens)}",
            [""],
            [(f"{row * _ROW * SECONDS // TOKENS} s", [cut(place, row)]) for row in range(rows)],
        )
        for place in range(len(sources))
    ]
    return still, frames


def _head(place: int, tokens: list[int]) -> str:
    return f"block {place + 1}: {tokens[place]}"
