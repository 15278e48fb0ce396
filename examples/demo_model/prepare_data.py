#!/usr/bin/env python
"""Fetch the 3D emoji, join them with their names and store the training set.

The pictures are the npm package @lobehub/fluent-emoji-3d (MIT, Microsoft Fluent Emoji), the names
those of PyPI `emoji`, joined by code point. Skin tones and flags are left out. `concepts.txt`
beside this file names the captions that the text-to-image model is trained on; the VAE sees every
picture.

Writes WORK_DIR/data/{images_256,images_128,images_64}.npy (uint8, on white) and captions.json.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from common import DEFAULT_WORK_DIR, ToolError, run_tool, save_json, write_atomically
from PIL import Image
from tqdm import tqdm

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
CONCEPTS = Path(__file__).resolve().parent / "concepts.txt"
SIZES = (256, 128, 64)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", default=DEFAULT_WORK_DIR, type=Path)
    parser.add_argument(
        "--package-file",
        type=Path,
        help=f"the .tgz of {PACKAGE}, where it is there already; without it npm is asked for it",
    )
    parser.add_argument(
        "--concepts", type=Path, default=CONCEPTS, help="captions to train on, one a line"
    )
    return parser.parse_args()


def code_points(stem: str) -> tuple[int, ...] | None:
    """The code points in a file name such as '1f468-200d-1f33e', or None if it is not one."""
    try:
        points = tuple(int(part, 16) for part in stem.split("-"))
    except ValueError:
        return None
    return points if all(p <= 0x10FFFF for p in points) else None


def is_variant(points: tuple[int, ...]) -> bool:
    """Skin tones and national flags: many near-identical pictures."""
    return any(0x1F3FB <= p <= 0x1F3FF or 0x1F1E6 <= p <= 0x1F1FF for p in points)


def caption_of(points: tuple[int, ...]) -> str | None:
    import emoji

    text = "".join(map(chr, points))
    for candidate in (text, text + "\ufe0f", text.replace("\ufe0f", "")):
        entry = emoji.EMOJI_DATA.get(candidate)
        if entry is not None:
            name = entry["en"].strip(":")
            return name.replace("_", " ").replace("-", " ").replace("’", "'").lower()
    return None


def load_picture(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    background = Image.new("RGBA", picture.size, "white")
    background.alpha_composite(picture)
    return background.convert("RGB")


def collect(folder: Path) -> list[tuple[str, Path]]:
    """(caption, file) of every picture that has a name; the first of each name."""
    found = {}
    for path in sorted(folder.glob("*.webp")):
        points = code_points(path.stem)
        if points is None or is_variant(points):
            continue
        caption = caption_of(points)
        if caption is not None:
            found.setdefault(caption, path)
    return list(found.items())


def unpack(package_file: Path | None, folder: Path) -> Path:
    if package_file is None:
        npm = shutil.which("npm")
        if npm is None:
            raise ToolError(
                f"npm is not installed; install it, or fetch {PACKAGE} elsewhere "
                "and give the file with --package-file"
            )
        done = subprocess.run(
            [npm, "pack", PACKAGE, "--pack-destination", str(folder)],
            capture_output=True,
            text=True,
        )
        files = list(folder.glob("*.tgz"))
        if done.returncode or not files:
            raise ToolError(f"npm pack {PACKAGE} failed: {done.stderr.strip()[-500:]}")
        package_file = files[0]
    if not package_file.is_file():
        raise ToolError(f"--package-file {package_file}: no such file")
    try:
        with tarfile.open(package_file) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(folder, filter="data")
            else:
                archive.extractall(folder)
    except tarfile.TarError as error:
        raise ToolError(f"{package_file} is not a readable npm package: {error}") from None
    assets = folder / "package" / "assets"
    if not assets.is_dir():
        raise ToolError(f"{package_file} holds no package/assets folder: is it {PACKAGE}?")
    return assets


def read_concepts(path: Path) -> set[str]:
    if not path.is_file():
        raise ToolError(f"--concepts {path}: no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def store(pairs: list[tuple[str, Path]], concepts: set[str], data_dir: Path) -> None:
    unknown = concepts - {caption for caption, _ in pairs}
    if unknown:
        raise ToolError(f"no picture for these concepts: {', '.join(sorted(unknown))[:300]}")
    pictures = {size: [] for size in SIZES}
    for _, path in tqdm(pairs, desc="pictures"):
        picture = load_picture(path)
        for size in SIZES:
            resized = (
                picture
                if picture.size == (size, size)
                else picture.resize((size, size), Image.LANCZOS)
            )
            pictures[size].append(np.asarray(resized))
    for size, arrays in pictures.items():

        def save(path, arrays=arrays):
            with open(path, "wb") as file:
                np.save(file, np.stack(arrays))

        write_atomically(data_dir / f"images_{size}.npy", save)
    save_json(
        data_dir / "captions.json",
        [{"caption": c, "file": p.name, "concept": c in concepts} for c, p in pairs],
    )


def main() -> None:
    args = parse_args()
    concepts = read_concepts(args.concepts)
    with tempfile.TemporaryDirectory() as folder:
        pairs = collect(unpack(args.package_file, Path(folder)))
        store(pairs, concepts, args.work_dir / "data")
    print(f"{len(pairs)} pictures, {len(concepts)} of them to train on, in {args.work_dir}/data")


if __name__ == "__main__":
    run_tool(main)
