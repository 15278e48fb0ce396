# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Commands as a shell calls them."""

import functools

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
def runs(command, tmp_path):
    """Call a command that must succeed; the folder of its run, and what it printed."""
    from mmagic_tome.lab.results import RunFolder

    def call(work_dir, *words):
        work_dir = tmp_path / str(work_dir)
        code, out, err = command(*words, "--work-dir", work_dir)
        assert code == 0, err
        (folder,) = work_dir.iterdir()
        return RunFolder(folder), out

    return call


@pytest.fixture
def no_loading(monkeypatch):
    """Let the test fail if weights are loaded."""
    from mmagic_tome.lab.runners.mmagic_source import MMagicSource
    from mmagic_tome.lab.runners.pipelines import PipelineSource

    def load(*args, **kwargs):
        pytest.fail("weights were loaded")

    for source in (MMagicSource, PipelineSource):
        monkeypatch.setattr(source, "load", load)


@pytest.fixture(scope="session")
def configs(sd_folder, tmp_path_factory):
    """Config files of one random MMagic model by name, each with something of its own."""
    pytest.importorskip("mmagic")
    from tiny import tiny_config, write_config

    folder = tmp_path_factory.mktemp("configs")
    model, clips = tiny_config(folder=sd_folder), tiny_config("AnimateDiff", sd_folder)
    tome = dict(ratio=0.5)
    infer_cfg = dict(prompts=["dog", "cat"], steps=3, guidance=2.0, size=64, seed=5)
    half = dict(name="half", tome_cfg=tome)
    evaluation = dict(prompts=["cat", "dog"], steps=4, size=64, methods=[half], rounds=0)
    evaluation.update(fewer_steps=[0.5], metrics=["psnr", "latent_error"])
    entries = {
        "plain": (model, {}),
        "tome": (model, dict(tome_cfg=tome)),
        "wrapped": (dict(type="ToMe", model=model, tome_cfg=tome), {}),
        "cache": ({**model, "cache_cfg": "fast"}, {}),
        "cache_on_top": (model, dict(cache_cfg="fast")),
        "clips": (clips, dict(tome_cfg=tome)),
        "elsewhere": (tiny_config(folder="/nowhere/at/all"), dict(tome_cfg=tome)),
        "defaults": (model, dict(infer_cfg=infer_cfg)),
        "evaluation": (model, dict(evaluation=evaluation)),
    }
    return {
        name: write_config(folder / f"{name}.py", model, **more)
        for name, (model, more) in entries.items()
    }


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """Folder of a pipeline by its name in tiny_folders.py, written once."""
    import tiny_folders

    @functools.cache
    def folder(name):
        return tiny_folders.pipeline_folder(name, tmp_path_factory.mktemp("pipelines") / name)

    return folder
