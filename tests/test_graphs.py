# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import subprocess
import sys

import torch

from mmagic_tome import graphs
from mmagic_tome.graphs import eager_only, prepare_compiler


def test_a_method_is_its_plain_self_until_the_compiler_is_prepared(monkeypatch):
    monkeypatch.setattr(graphs, "_waiting", [])

    class Hook:
        @eager_only()
        def decide(self, step):
            return 2 * step

    plain = Hook.__dict__["decide"]
    assert Hook().decide(3) == 6
    prepare_compiler()
    assert Hook.__dict__["decide"] is not plain
    assert Hook().decide(3) == 6
    assert graphs._waiting == []


def test_torch_that_takes_no_reason(monkeypatch):
    """That of before 2.8."""
    monkeypatch.setattr(graphs, "_waiting", [])
    seen = []

    def disable(fn=None, recursive=True):
        seen.append(recursive)
        return fn

    monkeypatch.setattr(torch.compiler, "disable", disable)

    class Hook:
        @eager_only()
        def decide(self): ...

        @eager_only(inner=True)
        def run(self): ...

    prepare_compiler()
    assert sorted(seen) == [False, True]


def test_importing_the_package_does_not_import_the_compiler():
    code = "import sys, mmagic_tome; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
