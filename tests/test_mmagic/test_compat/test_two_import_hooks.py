# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import sys
from importlib.util import find_spec

from mmagic_tome.mmagic.compat import import_hooks


def test_two_copies_of_the_package_wait_for_the_same_module(monkeypatch):
    """Each asks the other finders, and so the other copy."""
    copies = [import_hooks._ImportHook(), import_hooks._ImportHook()]
    for import_hook in copies:
        import_hook.waiting["antigravity"] = []
    monkeypatch.setattr(sys, "meta_path", [*copies, *sys.meta_path])
    for _ in range(2):
        spec = find_spec("antigravity")
        assert spec.origin.endswith("antigravity.py")
        assert isinstance(spec.loader, import_hooks._Loader)
    assert "antigravity" not in sys.modules
