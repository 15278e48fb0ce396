# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch

from mmagic_tome import graphs
from mmagic_tome.graphs import eager_only, prepare_compiler


@pytest.mark.parametrize("takes_reason", [True, False], ids=["torch 2.8", "torch before 2.8"])
def test_a_method_is_its_plain_self_until_the_compiler_is_prepared(takes_reason, monkeypatch):
    disable, seen = torch.compiler.disable, []

    def with_reason(fn=None, recursive=True, *, reason=None):
        seen.append((recursive, reason))
        return disable(fn, recursive)

    def without(fn=None, recursive=True):
        return with_reason(fn, recursive)

    monkeypatch.setattr(graphs, "_waiting", [])
    monkeypatch.setattr(torch.compiler, "disable", with_reason if takes_reason else without)

    class Hook:
        @eager_only()
        def decide(self, step):
            return 2 * step

        @eager_only(inner=True)
        def run(self): ...

    plain = Hook.__dict__["decide"]
    assert Hook().decide(3) == 6
    for _ in range(2):
        prepare_compiler()
        assert Hook.__dict__["decide"] is not plain and Hook().decide(3) == 6
        assert [recursive for recursive, _ in seen] == [False, True]  # the last one first
    assert all(("fullgraph" in (reason or "")) == takes_reason for _, reason in seen)
