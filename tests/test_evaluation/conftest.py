# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A random model's config and finished evaluations of it."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluations import METRICS, QUICK
from tiny import tiny_config, write_config

from mmagic_tome.evaluation import cli


@pytest.fixture(scope="session")
def evaluation(sd_folder, tmp_path_factory):
    """A config, a prompt file, and a function that runs the command."""
    pytest.importorskip("mmagic.apis", reason="the command runs MMagic models")
    gc.freeze()  # as tests/conftest.py does, of imports of before
    folder = tmp_path_factory.mktemp("evaluation")
    prompts = folder / "prompts.json"
    entries = ["a cat", {"prompt": "a dog", "negative_prompt": "a cat", "seed": 7}, "a cat in red"]
    prompts.write_text(json.dumps([*entries, "<b> </script>", "dog"]))
    config = write_config(folder / "tiny.py", tiny_config(folder=sd_folder))

    def run(out, *options, config=config, prompts=prompts, code=0):
        source = [] if prompts is None else ["--prompts", str(prompts)]
        argv = [config, *source, *QUICK, "--out", str(out), *map(str, options)]
        assert cli.main(argv) == code
        path = Path(out) / "results.json"
        return json.loads(path.read_text()) if path.is_file() else None

    return SimpleNamespace(config=config, prompts=prompts, run=run, folder=folder)


@pytest.fixture(scope="session")
def finished(evaluation, tmp_path_factory):
    """The folder and results of an evaluation with every kind of contender, and its cost."""
    out = tmp_path_factory.mktemp("finished") / "run"
    options = ["--ratios", "0.25", "0.5", "--tomesd", "0.5", "--batch-size", "2", *METRICS]
    results = evaluation.run(out, *options, "--cost-rounds", "3")
    return SimpleNamespace(folder=out, results=results, options=options)
