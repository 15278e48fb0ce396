# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Imports point down only, and importing the package imports no library."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmagic_tome"
CORE = (
    *(
        "__init__",
        "apply",
        "config",
        "errors",
        "graphs",
        "handle",
        "latents",
        "patch",
        "runs",
        "schedulers",
    ),
    *("schedules", "timeline", "validate", "cache", "merging", "methods", "models", "tome", "vit"),
)

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
    "methods": ("merging", "errors", "validate"),
    "models": ("merging", "errors", "validate"),
    "schedules": ("errors", "timeline", "validate"),
    "config": ("schedules", "methods", "merging", "errors", "timeline", "validate"),
    "cache": ("errors", "validate", "graphs", "latents", "patch", "runs", "timeline"),
}
LAYERS["tome"] = (*("config", *LAYERS["config"], "models", "patch", "graphs", "latents", "runs"),)
LAYERS["schedulers"] = ("cache", *LAYERS["cache"])
LAYERS["handle"] = ("tome", *LAYERS["tome"], "cache")
LAYERS["vit"] = ("merging", "errors", "validate", "patch", "graphs")
LAYERS["apply"] = ("handle", *LAYERS["handle"], "schedulers", "vit")

# The package without its __init__, and what may not be imported.
_SCRIPT = """
import importlib, pkgutil, sys, types

layer, path, allowed, blocked = sys.argv[1], sys.argv[2], sys.argv[3].split(), sys.argv[4].split()
package = types.ModuleType("mmagic_tome")
package.__path__ = [path]
sys.modules["mmagic_tome"] = package


class Blocked:
    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        above = parts[0] == "mmagic_tome" and len(parts) > 1 and parts[1] not in allowed
        if above or parts[0] in blocked:
            raise ModuleNotFoundError(f"{layer} imports {name}", name=name)


sys.meta_path.insert(0, Blocked())
module = importlib.import_module(f"mmagic_tome.{layer}")
for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"mmagic_tome.{layer}."):
    importlib.import_module(info.name)
"""


def imports(layer, allowed, blocked=()):
    command = [sys.executable, "-c", _SCRIPT, layer, str(PACKAGE), " ".join(allowed)]
    return subprocess.run([*command, " ".join(blocked)], capture_output=True, text=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_without_those_above(layer):
    blocked = ["diffusers", "mmagic", "mmengine"]
    if layer in ("merging", "validate", "errors"):
        blocked.append("numpy" if layer == "merging" else "torch")
    done = imports(layer, (layer, *LAYERS[layer]), blocked)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_import_of_a_layer_above_fails():
    """The check itself."""
    done = imports("tome", [one for one in ("tome", *LAYERS["tome"]) if one != "runs"])
    assert done.returncode and "tome imports mmagic_tome.runs" in done.stderr
    done = imports("merging", ("merging",), ["torch"])
    assert done.returncode and "merging imports torch" in done.stderr


def test_no_file_of_the_core_is_long():
    files = [path for name in CORE for path in [PACKAGE / f"{name}.py"] if path.exists()]
    files += [path for name in CORE for path in (PACKAGE / name).rglob("*.py")]
    assert len(files) > 60
    long = {path.name: len(path.read_text("utf-8").splitlines()) for path in files}
    assert not {name: lines for name, lines in long.items() if lines > 400}


def test_importing_the_package_imports_no_library():
    """Where no MMagic is there to be repaired; of the environment's libraries none is loaded."""
    script = """
import importlib.util, sys
find_spec = importlib.util.find_spec
hidden = ("mmengine", "mmagic", "mmpretrain", "torchvision")
importlib.util.find_spec = lambda name, *more: None if name in hidden else find_spec(name, *more)
import mmagic_tome
libraries = ("torch", "numpy", "diffusers", "transformers", "mmengine", "mmagic")
print(*[name for name in libraries if name in sys.modules])
assert mmagic_tome.__version__ and "apply_tome" in dir(mmagic_tome)
assert set(mmagic_tome.__all__) <= set(dir(mmagic_tome))
mmagic_tome.apply_tome
print("torch" in sys.modules, "diffusers" in sys.modules)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "True False"]


def test_importing_the_package_beside_mmagic_imports_no_torch():
    script = "import sys, mmagic_tome; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_public_name_is_there():
    import mmagic_tome

    for name in mmagic_tome.__all__:
        assert getattr(mmagic_tome, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'apply_tomes'"):
        mmagic_tome.apply_tomes  # noqa: B018
