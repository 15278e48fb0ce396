# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where figures were measured."""

import json
import os

import torch

import mmagic_tome
from mmagic_tome.lab.environment import environment


def test_environment_is_that_of_this_process():
    found = environment("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["mmagic_tome"] == mmagic_tome.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert (found["cpus"], found["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert found["gpu"] is None and found["processor"]
