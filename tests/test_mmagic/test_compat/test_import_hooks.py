# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types

import pytest

from mmagic_tome.mmagic.compat.import_hooks import _IMPORT_HOOK, around_import, when_imported


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    """Writes an importable module; forgets it, and what waits for it, afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)
        _IMPORT_HOOK.pop(name)


def recorder(events, label):
    @contextlib.contextmanager
    def around():
        events.append(f"before {label}")
        try:
            yield
        except ValueError:
            events.append(f"failed {label}")
            raise
        events.append(f"after {label}")

    return around


def test_callbacks_enclose_the_first_import_only(module_file, monkeypatch):
    name = module_file("tome_hook_order", "import tome_hook_events as e\ne.events.append('body')")
    events = []
    monkeypatch.setitem(sys.modules, "tome_hook_events", types.SimpleNamespace(events=events))
    around_import(name, recorder(events, "a"))
    around_import(name, recorder(events, "b"))
    assert importlib.util.find_spec(name) is not None
    assert events == [], "asking for a spec is not importing"
    module = importlib.import_module(name)
    assert events == ["before a", "before b", "body", "after b", "after a"]
    importlib.reload(module)
    assert events[5:] == ["body"]
    # It is an ordinary module.
    assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
    assert module.__loader__ is module.__spec__.loader and "body" in inspect.getsource(module)


def test_callbacks_wait_again_after_a_failed_import(module_file):
    name = module_file("tome_hook_again", "raise ValueError('a dependency is missing')")
    events = []
    around_import(name, recorder(events, "a"))
    around_import(name, recorder(events, "b"))
    with pytest.raises(ValueError, match="missing"):
        importlib.import_module(name)
    assert events == ["before a", "before b", "failed b", "failed a"]
    assert name not in sys.modules
    del events[:]
    module_file(name, "value = 'now it is installed, and the file has another length'")
    importlib.import_module(name)
    assert events == ["before a", "before b", "after b", "after a"]
    assert name not in _IMPORT_HOOK.waiting


def test_an_action_after_an_import_or_now_and_the_hook_leaves(module_file, monkeypatch):
    monkeypatch.setattr(_IMPORT_HOOK, "waiting", {})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not _IMPORT_HOOK])
    name = module_file("tome_hook_to_come", "done = True\n")
    seen = []
    when_imported(name, lambda: seen.append(sys.modules[name].done))
    assert seen == [] and sys.meta_path[0] is _IMPORT_HOOK
    importlib.import_module(name)
    assert seen == [True] and _IMPORT_HOOK not in sys.meta_path
    when_imported(name, lambda: seen.append("now"))
    assert seen == [True, "now"]
