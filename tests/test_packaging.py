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
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
def sdist(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=source)
    (path,) = folder.glob("*.tar.gz")
    return path


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

    # A bare install brings torch and diffusers; no version may be forced on a user's environment.
    assert requirements(metadata) == {"torch", "diffusers"}
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert not [line for line in required if "==" in line and "extra ==" not in line]
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M))
    assert {"mmagic", "eval", "demo", "docs"} <= extras


def requirements(metadata, extra=None):
    """Names of what the package asks for; those of an extra alone."""
    found = set()
    for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M):
        one = Requirement(line)
        wanted = one.marker is None if extra is None else one.marker is not None
        if wanted and (extra is None or one.marker.evaluate({"extra": extra})):
            found.add(one.name)
    return found


def test_package_index_takes_it(wheel, sdist, tmp_path):
    printed = run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=tmp_path)
    assert printed.count("PASSED") == 2


@pytest.mark.parametrize("url", ["", "https://example.org/us/mmagic_tome"])
def test_readme_has_no_relative_links_outside_of_the_repository(source, tmp_path, url):
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    run(sys.executable, *command, cwd=source, PROJECT_URL=url)
    (info,) = tmp_path.rglob("PKG-INFO")
    text = info.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    assert targets and all(target.startswith("http") for target in targets)
    own = [target for target in targets if "example.org" in target]
    assert bool(own) == bool(url)
    for target in own:
        path = re.sub(r"#.*", "", target.removeprefix(url)).replace("/raw/", "/blob/")
        assert (ROOT / path.removeprefix("/blob/main/").lstrip("/")).exists(), target
    # As many links as there are, or their words alone.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words = [w for i, w in re.findall(r"(!?)\[([^\[\]]+)\]\([^()\s]+\)", readme) if not i]
    assert all(word in text for word in words)


def test_source_distribution_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (folder,) = tmp_path.iterdir()
    command = ["setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path / "wheel"]
    run(sys.executable, *command, cwd=folder)
    (rebuilt,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


# --- environments with nothing but what the wheel asks for ----------------------------------------


@pytest.fixture(scope="module")
def alone(wheel, tmp_path_factory):
    """Runs this Python with the wheel, what it (or an extra) asks for, what that asks for, and no
    other package: site-packages are links to the installed ones, so nothing is downloaded."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA")))
    metadata = metadata.decode()

    def environment(extra=None):
        folder = tmp_path_factory.mktemp("alone")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wanted = requirements(metadata) | (requirements(metadata, extra) if extra else set())
        for name in closure(wanted):
            for file in distribution(name).files or ():
                top = file.parts[0]
                if top not in ("..", "__pycache__") and not (folder / top).exists():
                    (folder / top).symlink_to(Path(distribution(name).locate_file(top)))
        return functools.partial(run, sys.executable, "-S", PYTHONPATH=str(folder))

    return environment


def closure(names):
    """Names of distributions, and of all that they need here."""
    found, pending = set(), [Requirement(name) for name in names]
    while pending:
        one = pending.pop()
        key = re.sub(r"[-_.]+", "-", one.name).lower(), frozenset(one.extras)
        if key in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(key)
        for line in distribution(one.name).requires or ():
            needed = Requirement(line)
            contexts = [{"extra": extra} for extra in one.extras or [""]]
            if needed.marker is None or any(map(needed.marker.evaluate, contexts)):
                needed.marker = None
                pending.append(needed)
    return {name for name, _ in found}


BARE = """
import importlib.util, torch
import mmagic_tome
from diffusers import DDIMScheduler, UNet2DConditionModel
for name in ("transformers", "mmengine", "scipy", "matplotlib", "torchvision", "gradio"):
    assert importlib.util.find_spec(name) is None, name
torch.manual_seed(0)
attention = dict(cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8)
blocks = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
network = UNet2DConditionModel(
    sample_size=16, block_out_channels=(32, 64), layers_per_block=1, **attention, **blocks
).eval()
text, noise = torch.randn(1, 5, 16), torch.randn(1, 4, 16, 16)

class Model:
    unet, scheduler = network, DDIMScheduler()

def generate(x=noise):
    Model.scheduler.set_timesteps(12)
    with torch.no_grad():
        for t in Model.scheduler.timesteps:
            x = Model.scheduler.step(network(x, t, text).sample, t, x).prev_sample
    return x

baseline = generate()
with mmagic_tome.apply_cache(Model, tolerance=0.5) as cache, mmagic_tome.apply_tome(Model) as tome:
    assert not torch.equal(generate(), baseline)
    print(cache.summary(), tome.summary(), sep="\\n")
    assert any(row["skipped"] for row in cache.stats()) and tome.stats()[0]["kept"] == 128
assert torch.equal(generate(), baseline)
try:
    mmagic_tome.build_tome(dict(type="StableDiffusion"), tome_cfg=dict(ratio=0.5))
except ImportError as error:
    assert "mmagic" in str(error)
report = mmagic_tome.compat.report().splitlines()
assert report and all(line.startswith("not installed") for line in report)
"""


def test_bare_install_merges_and_caches(alone, tmp_path):
    printed = alone()("-W", "error::UserWarning:mmagic_tome", "-c", BARE, cwd=tmp_path)
    assert "step caching in UNet2DConditionModel" in printed and "removed" in printed


def test_demo_extra_suffices_for_the_page(alone, tmp_path):
    script = """
import importlib.util
from mmagic_tome.lab.demo import Demo, demo_source
from mmagic_tome.lab.demo_page import build_page, report_of
assert not any(map(importlib.util.find_spec, ("mmengine", "mmagic", "torchvision")))
demo = Demo(demo_source(), steps=4, size=64)
found = demo.compare(demo.first)
print(len(build_page(demo).fns), len(found.steps), "figures" in report_of(found))
"""
    printed = alone("demo")("-W", "ignore", "-c", script, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert re.search(r"[1-9]\d* 4 True", printed)


def test_eval_extra_suffices_for_the_commands(alone, tmp_path):
    from mmagic_tome.assets import asset_path

    command = ["-m", "mmagic_tome", "infer", "--pipeline", asset_path("demo_model"), "--compare"]
    options = ["--steps=6", "--size=64", "--rounds=1", "--device=cpu", "--tolerance=0.1"]
    python = alone("eval")
    assert "speed-up" in python("-W", "ignore", *command, *options, "--prompt=cat", cwd=tmp_path)


def test_configs_and_commands_of_the_wheel_work_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "mine.py").write_text(
        "_base_ = 'mmagic_tome::demo/sd-emoji.py'\ntome_cfg = dict(ratio=0.25)\n"
    )
    script = """
import runpy, sys
import mmagic_tome
from pathlib import Path
from mmengine.config import Config
from mmengine.hub import get_config
config = Config.fromfile('mine.py')
print("mine:", config.tome_cfg.ratio, config.model.type, config.model.unet.from_pretrained)
print("theirs:", get_config('mmagic_tome::demo/sd-emoji_tome-5e-1.py').tome_cfg.ratio)
tools = Path("installed/mmagic_tome/.mim/tools").resolve()
sys.path.insert(0, str(tools))
sys.argv = ["infer.py", *sys.argv[1:]]
runpy.run_path(str(tools / "infer.py"), run_name="__main__")
"""
    options = ["--steps=12", "--size=64", "--rounds=1", "--device=cpu", "--compare"]
    command = ["-W", "ignore", "-c", script, *options, "--prompt=red apple"]
    where = dict(PYTHONPATH=str(tmp_path / "installed"), OMP_NUM_THREADS="1")
    printed = run(sys.executable, *command, cwd=tmp_path, **where)
    weights = re.search("mine: 0.25 StableDiffusion (.*)", printed)[1]
    assert Path(weights, "unet", "config.json").is_file() and "theirs: 0.5" in printed
    assert str(ROOT) not in weights and "step caching in" in printed and "speed-up" in printed
    # Without a config the named setting that users are told to start with.
    (folder,) = (tmp_path / "work_dirs" / "sd-emoji_cache-balanced").iterdir()
    rows = map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    found = {row["kind"]: row for row in rows}  # the last one of each, the method's
    assert (folder / found["image"]["file"]).is_file() and (folder / "compare.png").is_file()
    regions = found["applied"]["stats"]["step caching"]
    assert [row["region"] for row in regions] == ["network", "inner", "innermost"]
    assert any(row["skipped"] > 0 for row in regions)
