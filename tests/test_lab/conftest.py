# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Commands as a shell calls them."""

import functools
import json

import pytest

from mmagic_tome.__main__ import main


@pytest.fixture
def command(capfd):
    """Call ``python -m mmagic_tome``; its exit code, what it printed, and its errors."""

    def call(*words):
        code = main([str(word) for word in words])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def results(command, tmp_path):
    """Call a command that must succeed; the folder and the content of its results.json."""

    def call(work_dir, *words):
        work_dir = tmp_path / str(work_dir)
        code, out, err = command(*words, "--work-dir", work_dir)
        assert code == 0, err
        (folder,) = work_dir.iterdir()
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return folder, {**found, "printed": out}

    return call


@pytest.fixture
def no_loading(monkeypatch):
    """Let the test fail if weights are loaded."""
    from mmagic_tome.lab.runners.mmagic import MMagicSource
    from mmagic_tome.lab.runners.pipelines import PipelineSource

    def load(*args, **kwargs):
        pytest.fail("weights were loaded")

    for source in (MMagicSource, PipelineSource):
        monkeypatch.setattr(source, "load", load)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """Folder of a pipeline by its name in tiny_folders.py, written once."""
    import tiny_folders

    @functools.cache
    def folder(name):
        return tiny_folders.pipeline_folder(name, tmp_path_factory.mktemp("pipelines") / name)

    return folder
