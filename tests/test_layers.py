# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Imports point down only, and importing the package imports no library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmagic_tome"

# Layer -> the modules of the package that it may import, itself aside.
LAYERS = {
    "errors": (),
    "merging": (),
    "timeline": (),
    "graphs": (),
    "latents": (),
    "runs": ("latents",),
    "validate": ("errors",),
    "patch": ("graphs",),
    "base_handle": ("patch", "graphs"),
    "methods": ("merging", "errors", "validate"),
    "models": ("merging", "errors", "validate"),
    "schedules": ("errors", "timeline", "validate"),
    "config": ("schedules", "methods", "merging", "errors", "timeline", "validate"),
    "cache": ("errors", "validate", "graphs", "latents", "patch", "runs", "timeline"),
}
LAYERS["tome"] = (*("config", *LAYERS["config"], "models", "patch", "graphs", "latents", "runs"),)
LAYERS["schedulers"] = ("cache", *LAYERS["cache"])
LAYERS["handle"] = ("tome", *LAYERS["tome"], "cache", "base_handle")
LAYERS["vit"] = ("merging", "errors", "validate", "base_handle", "patch", "graphs")
LAYERS["apply"] = ("handle", *LAYERS["handle"], "schedulers", "vit")

# One process imports torch once and forks for every layer: the package without its __init__, and
# what may not be imported.
_SCRIPT = """
import importlib, json, os, pkgutil, sys, traceback, types

path, jobs = sys.argv[1], json.loads(sys.argv[2])


class Blocked:
    def __init__(self, layer, allowed, blocked):
        self.layer, self.allowed, self.blocked = layer, allowed, blocked

    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        above = parts[0] == "mmagic_tome" and len(parts) > 1 and parts[1] not in self.allowed
        if above or parts[0] in self.blocked:
            raise ModuleNotFoundError(f"{self.layer} imports {name}", name=name)


def check(layer, allowed, blocked):
    package = types.ModuleType("mmagic_tome")
    package.__path__ = [path]
    sys.modules["mmagic_tome"] = package
    sys.meta_path.insert(0, Blocked(layer, allowed, blocked))
    module = importlib.import_module(f"mmagic_tome.{layer}")
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"mmagic_tome.{layer}."):
        importlib.import_module(info.name)


results = []
for layer, allowed, blocked in jobs:
    if "torch" not in blocked and "numpy" not in blocked:
        import torch
    reading, writing = os.pipe()
    if not os.fork():
        message = ""
        try:
            check(layer, allowed, blocked)
        except BaseException:
            message = traceback.format_exc()
        os.write(writing, message[-4000:].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        results.append(stream.read())
    os.wait()
print(json.dumps(results))
"""


def imports(*jobs):
    """What goes wrong when layers are imported, one message per (layer, allowed, blocked)."""
    # Those that may not see numpy or torch come before somebody imports them.
    order = sorted(range(len(jobs)), key=lambda i: not {"numpy", "torch"} & set(jobs[i][2]))
    command = [sys.executable, "-c", _SCRIPT, str(PACKAGE)]
    done = subprocess.run(
        [*command, json.dumps([jobs[i] for i in order])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(zip(order, json.loads(done.stdout)))
    return [found[i] for i in range(len(jobs))]


@pytest.fixture(scope="module")
def messages():
    jobs = []
    for layer, below in LAYERS.items():
        blocked = ["diffusers", "mmagic", "mmengine"]
        more = {"validate": ["torch"], "errors": ["torch"], "merging": ["numpy"]}
        blocked += {**more, "vit": ["numpy", "timm", "transformers"]}.get(layer, [])
        jobs.append((layer, (layer, *below), blocked))
    return dict(zip(LAYERS, imports(*jobs)))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_without_those_above(messages, layer):
    assert messages[layer] == ""


def test_an_import_of_a_layer_above_fails():
    """The check itself."""
    allowed = [one for one in ("tome", *LAYERS["tome"]) if one != "runs"]
    above, library = imports(("tome", allowed, []), ("merging", ("merging",), ["torch"]))
    assert "tome imports mmagic_tome.runs" in above
    assert "merging imports torch" in library


def test_no_file_of_the_core_is_long():
    names = ("cache", "merging", "methods", "models", "tome", "vit", "mmagic")
    files = [*PACKAGE.glob("*.py"), *(f for name in names for f in (PACKAGE / name).rglob("*.py"))]
    assert len(files) > 60
    long = {path.name: len(path.read_text("utf-8").splitlines()) for path in files}
    assert not {name: lines for name, lines in long.items() if lines > 400}


# Without MMagic there is nothing to repair, and torch comes with the first name that is used.
_ALONE = """
import importlib.util, sys
find_spec = importlib.util.find_spec
hidden = ("mmengine", "mmagic", "mmpretrain", "torchvision")
importlib.util.find_spec = lambda name, *more: None if name in hidden else find_spec(name, *more)
"""
_IMPORT = """
import sys, mmagic_tome
libraries = ("torch", "numpy", "diffusers", "transformers", "mmengine", "mmagic")
print(*[name for name in libraries if name in sys.modules])
assert mmagic_tome.__version__ and set(mmagic_tome.__all__) <= set(dir(mmagic_tome))
for name in mmagic_tome.__all__ if ALONE else ():
    assert name in ("build_tome", "compat") or getattr(mmagic_tome, name) is not None
    assert "diffusers" not in sys.modules, name
"""


@pytest.mark.parametrize("alone", [True, False])
def test_importing_the_package_imports_no_library(alone):
    """Where no MMagic is there to be repaired, and beside it."""
    script = f"ALONE = {alone}{_ALONE if alone else ''}{_IMPORT}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded if alone else not loaded & {"torch", "numpy", "diffusers"}


def test_every_public_name_is_there():
    import mmagic_tome

    for name in mmagic_tome.__all__:
        assert getattr(mmagic_tome, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'apply_tomes'"):
        mmagic_tome.apply_tomes  # noqa: B018
