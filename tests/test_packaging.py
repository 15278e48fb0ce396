# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The wheel: what is in it, and that it works on its own, away from the checkout."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    *(".git", ".venv*", ".mim", "outputs", "work_dirs", "build", "dist", "*.egg-info"),
    *("__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"),
)
pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    """Run a command that must succeed; return what it printed."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources: building leaves files behind, which belong in no checkout."""
    folder = tmp_path_factory.mktemp("source") / "mmagic_tome"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCE)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs this Python, with the wheel in place of the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    options = ["--no-deps", "--target", folder]
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
    return functools.partial(run, sys.executable, PYTHONPATH=str(folder))


def test_wheel_holds_what_it_should(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    expected = {"mmagic_tome/.mim/model-index.yml", "mmagic_tome/apply.py"}
    for folder, place in (
        *((name, "mmagic_tome/.mim") for name in ("configs", "tools")),
        *((f"mmagic_tome/{name}", "") for name in ("assets", "lab/templates")),
    ):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        relative = (path.relative_to(ROOT) for path in files if path.parent.name != "__pycache__")
        expected |= {Path(place, path).as_posix() for path in relative}
    assert expected <= set(names)
    strays = [n for n in names if not re.match(r"mmagic_tome(/|-[\d.]+\.dist-info/)", n)]
    assert not strays, "configs/ and tools/ stay out of site-packages itself"
    assert not [n for n in names if n.endswith((".pyc", ".part")) or "__pycache__" in n]
    for model in ("demo_model", "demo_dit"):
        weights = [n for n in names if f"/{model}/" in n and n.endswith(".safetensors")]
        assert len(weights) >= 3, "the demo models (network, vae, text encoders) are package data"
        assert sum((ROOT / name).stat().st_size for name in weights) <= 24e6

    # No version of torch may be forced on a user's CUDA environment.
    assert "Provides-Extra: mim" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    required = [line for line in required if "extra ==" not in line]
    assert any("torch>=" in line for line in required)
    assert not [line for line in required if "==" in line]


def test_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=source)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (folder,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheel"]
    run(sys.executable, "-m", "pip", "wheel", folder, *options, cwd=tmp_path)
    (rebuilt,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_demo_runs_from_the_wheel(installed, tmp_path):
    where = installed("-c", "import mmagic_tome; print(mmagic_tome.__file__)", cwd=tmp_path)
    assert str(ROOT) not in where

    command = ["-m", "mmagic_tome", "infer", "--steps", "12", "--prompt", "red apple"]
    options = ["--compare", "--rounds", "1", "--size", "64", "--device", "cpu"]
    printed = installed(*command, *options, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "step caching in" in printed and "speed-up" in printed
    (folder,) = (tmp_path / "work_dirs" / "sd-emoji_tome-balanced").iterdir()
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (folder / result["images"][0]["file"]).is_file()
    assert (folder / result["compare"]).is_file()
    # Without a config the named setting that users are told to start with.
    regions = result["applied"]["stats"]["step caching"]
    assert [row["region"] for row in regions] == ["network", "inner", "innermost"]
    assert any(row["skipped"] > 0 for row in regions)


def test_configs_of_the_wheel_serve_as_bases(installed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "_base_ = 'mmagic_tome::demo/sd-emoji.py'\ntome_cfg = dict(ratio=0.25)\n"
    )
    script = """
import mmagic_tome
from mmengine.config import Config
from mmengine.hub import get_config
config = Config.fromfile('mine.py')
print(config.tome_cfg.ratio, config.model.type, config.model.unet.from_pretrained)
print(get_config('mmagic_tome::demo/sd-emoji_tome-5e-1.py').tome_cfg.ratio)
"""
    printed = installed("-W", "ignore", "-c", script, cwd=tmp_path).splitlines()
    ratio, kind, weights = printed[-2].split(" ", 2)
    assert (ratio, kind, printed[-1]) == ("0.25", "StableDiffusion", "0.5")
    assert Path(weights, "unet", "config.json").is_file() and str(ROOT) not in weights
    tool = Path(weights).parents[1] / ".mim" / "tools" / "infer.py"
    assert "usage: infer.py" in installed(tool, "--help", cwd=tmp_path)
