# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merging needs torch alone: neither numpy nor the rest of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmagic_tome

PACKAGE = Path(mmagic_tome.__file__).parent

SCRIPT = """
import sys, types

package = types.ModuleType("mmagic_tome")
package.__path__ = [PATH]
sys.modules["mmagic_tome"] = package

class Blocked:
    def find_spec(self, name, path=None, target=None):
        own = name == "mmagic_tome.merging" or name.startswith("mmagic_tome.merging.")
        if name.split(".")[0] == "numpy" or name.startswith("mmagic_tome.") and not own:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())

import torch
import importlib, pkgutil
import mmagic_tome.merging as merging

for module in pkgutil.iter_modules(merging.__path__):
    importlib.import_module(f"mmagic_tome.merging.{module.name}")
x = torch.randn(2, 64, 8)
layout = merging.random_layout(8, 8).select(0)
plan = merging.bipartite_match(x, *layout, 32)
assert plan.unmerge(plan.merge(x)).shape == x.shape
merge, unmerge = merging.bipartite_soft_matching(x, 8, class_token=True)
assert unmerge(merge(x)).shape == x.shape
assert not any(name.split(".")[0] == "numpy" for name in sys.modules)
print(sorted(name for name in sys.modules if name.startswith("mmagic_tome.")
             and not name.startswith("mmagic_tome.merging")))
"""


def test_merging_needs_torch_alone():
    script = SCRIPT.replace("PATH", repr(str(PACKAGE)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["merging", "methods"])
def test_no_private_name_crosses_files(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        private = [a.name for n in names for a in n.names if a.name.startswith("_")]
        assert not private, (path.name, private)
        modules = {alias.asname or alias.name for node in names for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                hidden = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not (hidden and node.value.id in modules), (path.name, node.attr)
