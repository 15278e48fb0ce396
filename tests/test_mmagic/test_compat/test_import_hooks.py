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


def test_callbacks_enclose_the_first_import_only(module_file):
    name = module_file("tome_hook_order", "import tome_hook_events as e\ne.events.append('body')")
    events = []
    sys.modules["tome_hook_events"] = types.SimpleNamespace(events=events)
    around_import(name, recorder(events, "a"))
    around_import(name, recorder(events, "b"))
    assert events == []
    module = importlib.import_module(name)
    assert events == ["before a", "before b", "body", "after b", "after a"]
    importlib.reload(module)
    assert events[5:] == ["body"]
    del sys.modules["tome_hook_events"]


def test_asking_for_a_spec_is_not_importing(module_file):
    name = module_file("tome_hook_spec", "value = 1")
    events = []
    around_import(name, recorder(events, name))
    assert importlib.util.find_spec(name) is not None
    assert events == []
    importlib.import_module(name)
    assert len(events) == 2


def test_the_module_is_an_ordinary_one(module_file):
    name = module_file("tome_hook_plain", "def f():\n    return 1\n")
    around_import(name, contextlib.nullcontext)
    module = importlib.import_module(name)
    assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
    assert module.__loader__ is module.__spec__.loader
    assert "return 1" in inspect.getsource(module.f)


def test_a_failing_import_fails_as_it_would(module_file):
    name = module_file("tome_hook_error", "raise ValueError('mine')")
    events = []
    around_import(name, recorder(events, name))
    with pytest.raises(ValueError, match="mine"):
        importlib.import_module(name)
    assert events == [f"before {name}", f"failed {name}"]
    assert name not in sys.modules


def test_a_missing_module_is_missing():
    around_import("tome_hook_nowhere", contextlib.nullcontext)
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("tome_hook_nowhere")
        assert importlib.util.find_spec("tome_hook_nowhere") is None
    finally:
        _IMPORT_HOOK.pop("tome_hook_nowhere")


def test_the_import_hook_leaves_when_nothing_waits(module_file, monkeypatch):
    monkeypatch.setattr(_IMPORT_HOOK, "waiting", {})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not _IMPORT_HOOK])
    name = module_file("tome_hook_leave", "")
    around_import(name, contextlib.nullcontext)
    assert sys.meta_path[0] is _IMPORT_HOOK
    importlib.import_module(name)
    assert _IMPORT_HOOK not in sys.meta_path


def test_callbacks_wait_again_after_a_failed_import(module_file):
    name = module_file("tome_hook_again", "raise ValueError('a dependency is missing')")
    events = []
    around_import(name, recorder(events, "a"))
    around_import(name, recorder(events, "b"))
    with pytest.raises(ValueError, match="missing"):
        importlib.import_module(name)
    del events[:]
    module_file(name, "value = 'now it is installed, and the file has another length'")
    importlib.import_module(name)
    assert events == ["before a", "before b", "after b", "after a"]
    assert name not in _IMPORT_HOOK.waiting


def test_an_action_after_an_import_or_now(tmp_path, monkeypatch):
    (tmp_path / "to_come.py").write_text("done = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    when_imported("to_come", lambda: seen.append(sys.modules["to_come"].done))
    assert seen == []
    importlib.import_module("to_come")
    assert seen == [True]
    when_imported("to_come", lambda: seen.append("now"))
    assert seen == [True, "now"]
    del sys.modules["to_come"]
