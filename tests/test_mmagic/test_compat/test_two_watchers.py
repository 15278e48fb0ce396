# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import sys
from importlib.util import find_spec

from mmagic_tome.mmagic.compat import watch


def test_two_copies_of_the_package_wait_for_the_same_module(monkeypatch):
    """Each asks the other finders, and so the other copy."""
    watchers = [watch._Watcher(), watch._Watcher()]
    for watcher in watchers:
        watcher.waiting["antigravity"] = []
    monkeypatch.setattr(sys, "meta_path", [*watchers, *sys.meta_path])
    for _ in range(2):
        spec = find_spec("antigravity")
        assert spec.origin.endswith("antigravity.py")
        assert isinstance(spec.loader, watch._Loader)
    assert "antigravity" not in sys.modules
