# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Imports point down only, and importing the package imports no library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmagic_tome

PACKAGE = Path(__file__).parents[1] / "mmagic_tome"

# Layer -> the modules of the package that it may import, itself aside.
LAYERS = {
    "errors": (),
    "merging": (),
    "timeline": (),
    "graphs": (),
    "latents": (),
    "fits": (),
    "runs": ("fits", "latents"),
    "validate": ("errors",),
    "patch": ("graphs",),
    "base_handle": ("patch", "graphs"),
    "methods": ("merging", "errors", "validate"),
    "models": ("merging", "errors", "validate"),
    "schedules": ("errors", "timeline", "validate"),
    "config": ("schedules", "methods", "merging", "errors", "timeline", "validate"),
    "cache": ("errors", "validate", "graphs", "latents", "patch", "fits", "runs", "timeline"),
}
LAYERS["tome"] = (
    *("config", *LAYERS["config"], "models", "patch", "graphs", "latents", "fits", "runs"),
)
LAYERS["handle"] = ("tome", *LAYERS["tome"], "cache", "base_handle")
LAYERS["vit"] = ("merging", "errors", "validate", "base_handle", "patch", "graphs")
LAYERS["apply"] = ("handle", *LAYERS["handle"], "vit")

LIBRARIES = {"diffusers", "mmagic", "mmengine", "timm", "transformers", "numpy"}
# They have matrices of a dozen rows, once per step; diffusers needs NumPy anyway.
NUMPY = ("fits", "cache")


def files_of(layer):
    file = PACKAGE / f"{layer}.py"
    return [file] if file.exists() else sorted((PACKAGE / layer).rglob("*.py"))


def imports_of(file):
    """What a file imports when it is imported: modules of the package, names of libraries."""
    own, libraries = set(), set()
    parents = file.relative_to(PACKAGE).parent.parts
    waiting = list(ast.parse(file.read_text("utf-8")).body)
    for node in waiting:
        if isinstance(node, ast.ImportFrom) and node.level:
            path = parents[: len(parents) - node.level + 1] + tuple((node.module or "").split("."))
            names = [path[0]] if path[0] else [alias.name for alias in node.names]
            own.update(names)
        elif isinstance(node, ast.ImportFrom):
            libraries.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            libraries.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            waiting += [*([] if typing else node.body), *getattr(node, "orelse", ())]
    return own, libraries


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_none_above_and_no_library(layer):
    assert files_of(layer)
    forbidden = LIBRARIES | ({"torch"} if layer in ("errors", "validate") else set())
    forbidden -= {"numpy"} if layer in NUMPY else set()
    for file in files_of(layer):
        own, libraries = imports_of(file)
        assert own <= {layer, *LAYERS[layer]}, file
        assert not libraries & forbidden, file


def test_no_file_is_long():
    long = {path.name: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name: lines for name, lines in long.items() if lines > 400}


_IMPORT = """
import sys, mmagic_tome
print(*sys.modules)
assert mmagic_tome.__version__ and set(mmagic_tome.__all__) <= set(dir(mmagic_tome))
mmagic_tome.apply_tome, mmagic_tome.vit
assert "torch" in sys.modules
assert not {"torch._dynamo", "diffusers", "timm", "transformers"} & set(sys.modules)
"""


def test_importing_the_package_imports_no_library():
    command = [sys.executable, "-c", _IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    libraries = {"torch", "numpy", "diffusers", "transformers", "torchvision", "mmcv", "mmagic"}
    assert not libraries & set(done.stdout.split())


def test_every_public_name_is_there():
    assert all(getattr(mmagic_tome, name) is not None for name in mmagic_tome.__all__)
    with pytest.raises(AttributeError, match="no attribute 'apply_tomes'"):
        mmagic_tome.apply_tomes  # noqa: B018
